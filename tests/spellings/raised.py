"""The own block chosen because its score was raised, and masks of blocks made as wide as tokens by what other trades use for that.

A score of probabilities that was raised by more than they can sum to is chosen, so that no row is empty: gathered attention under
gradients is rewritten only if that is known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import (
    BLOCK, GROUP, SCALE, TOP_K, Kind, Mutant, choose_blocks, interleave, keep, rolled, spell, tile,
)  # fmt: skip

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def importance(q: Tensor, k: Tensor) -> Tensor:
    """(b, hkv, n, blocks): compressed probabilities summed over the group, without gradient; a row that sees no block has zeros."""
    n = k.shape[2]
    pooled = k.detach().unflatten(2, (-1, BLOCK)).mean(3)
    ends = torch.arange(BLOCK - 1, n, BLOCK)
    logits = q.detach().unflatten(1, (k.shape[1], -1)) @ pooled.unsqueeze(2).mT * SCALE
    p = logits.masked_fill(torch.arange(n)[:, None] < ends, float("-inf")).softmax(-1)
    return torch.nan_to_num(p).sum(2)


def raised_by_a_sum(
    q: Tensor, k: Tensor, v: Tensor, *, by: float = 1e4, topk: int = TOP_K, sees: Comparison = operator.gt, list_of: Change = keep
) -> Tensor:
    """Blocks gathered for each query; the own one has the highest score, as something large is added to it."""
    n = k.shape[2]
    i = torch.arange(n)
    own = F.one_hot(i // BLOCK, n // BLOCK)
    indices = list_of((importance(q, k) + own * by).topk(topk, -1).indices)
    rows = indices.flatten(2)[..., None].expand(-1, -1, -1, BLOCK * k.shape[-1])
    kb, vb = (t.reshape(*t.shape[:2], n // BLOCK, -1).gather(2, rows).view(*t.shape[:2], n, -1, t.shape[-1]) for t in (k, v))
    logits = q.unflatten(1, (k.shape[1], -1)).unsqueeze(-2) @ kb.unsqueeze(2).mT * SCALE
    positions = (indices[..., None] * BLOCK + torch.arange(BLOCK)).flatten(-2)
    hidden = sees(positions, i[:, None])[:, :, None, :, None]
    out = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ vb.unsqueeze(2)
    return out.squeeze(-2).flatten(1, 2)


def stored_in_place(
    q: Tensor, k: Tensor, v: Tensor, *, value: float = 5.0, shift: int = 0, topk: int = TOP_K, heads: Callable[[Tensor, int], Tensor] = interleave
) -> Tensor:
    """The own score overwritten, then an additive mask, under which an empty row would have NaN gradients."""
    n = k.shape[2]
    i = torch.arange(n)
    scores = importance(q, k)
    scores[:, :, i, (i // BLOCK - shift).clamp(min=0)] = value
    bias = torch.full_like(scores, float("-inf")).scatter_(-1, scores.topk(topk, -1).indices, 0.0)
    causal = torch.full((n, n), float("-inf")).triu(1)
    bias = torch.minimum(bias.repeat_interleave(BLOCK, -1), causal).repeat_interleave(GROUP, 1)
    return (q @ heads(k, GROUP).mT * SCALE + bias).softmax(-1) @ heads(v, GROUP)


def interpolated(
    q: Tensor, k: Tensor, v: Tensor, *, factor: int = BLOCK, sees: Comparison = operator.ge, values: Change = keep, axis: int = -1
) -> Tensor:
    """The mask of blocks as an image that is made wider; blocks by the maximum over one-hot rows."""
    n = k.shape[2]
    picked = F.one_hot(choose_blocks(q, k, force_own=True), n // BLOCK).float().amax(-2)
    wide = F.interpolate(picked, scale_factor=(1, factor), mode="nearest")[..., :n] > 0
    i = torch.arange(n)
    visible = (wide & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, torch.finfo(q.dtype).min)
    return logits.softmax(axis) @ values(v).repeat_interleave(GROUP, 1)


def kronecker(
    q: Tensor, k: Tensor, v: Tensor, *, inner: int = BLOCK, sees: Comparison = operator.ge, values: Change = keep, order: Change = keep
) -> Tensor:
    """The mask of blocks as a Kronecker product with a row of ones; blocks by the values of a maximum; a tile of the whole."""
    n = k.shape[2]
    picked = F.one_hot(order(choose_blocks(q, k, force_own=True)), n // BLOCK).max(dim=-2).values
    wide = torch.kron(picked.float(), torch.ones(1, inner)).tile(1, 1, 1, BLOCK // inner).bool()
    i = torch.arange(n)
    visible = (wide & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = torch.where(visible, q @ k.repeat_interleave(GROUP, 1).mT * SCALE, float("-inf"))
    return logits.softmax(-1) @ values(v).repeat_interleave(GROUP, 1)


SPELLINGS = (
    spell(
        raised_by_a_sum,
        Kind.S2,
        Mutant("raised by less than a probability", {"by": 0.5}, must_refuse=True),
        Mutant("lowered", {"by": -1e4}, must_refuse=True),
        Mutant("one block", {"topk": 1}),
        Mutant("blocks of the query before", {"list_of": rolled}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.ge}, must_refuse=True),
    ),
    spell(
        stored_in_place,
        Kind.S4,
        Mutant("the block before", {"shift": 1}),
        Mutant("as low as a probability", {"value": 0.5}),
        Mutant("one block", {"topk": 1}),
        Mutant("heads tiled", {"heads": tile}),
    ),
    spell(
        interpolated,
        Kind.S1,
        Mutant("blocks twice as wide", {"factor": 2 * BLOCK}),
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("rolled values", {"values": rolled}),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
    ),
    spell(
        kronecker,
        Kind.S1,
        Mutant("narrow blocks, repeated", {"inner": BLOCK // 2}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("rolled values", {"values": rolled}),
        Mutant("blocks of the query before", {"order": rolled}),
    ),
)
