"""Membership in one pool for all queries: `torch.isin` of codes in which each row of the list has numbers of its own."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .spelling import BLOCK, GROUP, SCALE, TOP_K, Kind, Mutant, choose_blocks, keep, rolled, spell

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def codes_of_rows(
    q: Tensor, k: Tensor, v: Tensor, *, topk: int = TOP_K, sees: Comparison = operator.ge, shared: int = 1, other: Change = keep
) -> Tensor:
    """`row * (blocks + 1) + block`; blocks of the future get the number that no key has."""
    n, blocks = k.shape[2], k.shape[2] // BLOCK
    position = torch.arange(n)
    indices = choose_blocks(q, k, topk=topk)
    indices = torch.where(indices > position[:, None] // BLOCK, blocks, indices)
    row = torch.arange(indices[..., 0].numel()).view(*indices.shape[:3], 1) // shared * (blocks + 1)
    seen = torch.isin(other(row) + position // BLOCK, row + indices) & sees(position[:, None], position)
    logits = q @ k.repeat_interleave(GROUP, 1).mT * SCALE
    logits = logits.masked_fill(~seen.repeat_interleave(GROUP, 1), torch.finfo(q.dtype).min)
    return logits.softmax(-1) @ v.repeat_interleave(GROUP, 1)


def codes_flattened(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = BLOCK, step: int = 0, own: int = 0, values: Change = keep
) -> Tensor:
    """Rows are numbered in a matrix (b * hkv * n, t), which is flattened for `isin`; inverted."""
    b, hkv, n, _ = k.shape
    blocks = n // block
    indices = choose_blocks(q, k, block=block, force_own=True).flatten(0, 2)
    row = torch.arange(b * hkv * n)[:, None] * (blocks + step)
    codes = row + torch.arange(blocks) + own
    hidden = torch.isin(codes, (row + indices).flatten(), invert=True).view(b, hkv, n, blocks).repeat_interleave(block, -1)
    hidden = (hidden | torch.ones(n, n, dtype=torch.bool).triu(1)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(hidden, float("-inf"))
    return logits.softmax(-1) @ values(v).repeat_interleave(GROUP, 1)


SPELLINGS = (
    spell(
        codes_of_rows,
        Kind.S1,
        Mutant("two blocks", {"topk": 2}),
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("two rows share their codes", {"shared": 2}, must_refuse=True),
        Mutant("codes of the next row", {"other": rolled}),
    ),
    spell(
        codes_flattened,
        Kind.S1,
        Mutant("blocks of 16", {"block": 2 * BLOCK}),
        Mutant("rows overlap by two blocks", {"step": -2}, must_refuse=True),
        Mutant("the blocks before", {"own": 1}),
        Mutant("rolled values", {"values": rolled}),
    ),
)
