"""Contractions without a matrix product: multiply and sum, `vecdot`, and `baddbmm` that adds the mask."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .spelling import (
    BLOCK,
    GROUP,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    Spelling,
    choose_blocks,
    flipped,
    interleave,
    keep,
    rolled,
    spell,
    tile,
)

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def gathered_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    scale: float = SCALE,
    sees: Comparison = operator.le,
    values: Change = keep,
    axis: int = -1,
) -> Tensor:
    """Gathered keys (b, hkv, n, t * B, d), multiplied with the query and summed; and so with the values."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, block=block, force_own=True)
    position = (indices[..., None] * block + torch.arange(block)).flatten(3)
    rows = torch.arange(b)[:, None, None, None], torch.arange(hkv)[:, None, None]
    keys, vals = (x[(*rows, position)].unsqueeze(2) for x in (k, values(v)))
    logits = (q.unflatten(1, (hkv, GROUP))[..., None, :] * keys).sum(-1) * scale
    visible = sees(position, torch.arange(n)[:, None]).unsqueeze(2)
    weights = logits.masked_fill(~visible, float("-inf")).softmax(axis)
    return (weights.unsqueeze(-1) * vals).sum(-2).flatten(1, 2)


def gathered_slots(
    q: Tensor, k: Tensor, v: Tensor, *, topk: int = TOP_K, within: Change = keep
) -> Tensor:
    """Slot and offset stay two axes, which are summed together; the query is scaled before the product."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, topk=topk, force_own=True)
    rows = torch.arange(b)[:, None, None, None], torch.arange(hkv)[:, None, None], indices
    keys, vals = (x.unflatten(2, (-1, BLOCK))[rows].unsqueeze(2) for x in (k, v))
    visible = indices[..., None] * BLOCK + torch.arange(BLOCK) <= torch.arange(n)[:, None, None]
    logits = torch.linalg.vecdot((q * SCALE).unflatten(1, (hkv, GROUP))[..., None, None, :], keys)
    logits = logits.where(visible.unsqueeze(2), float("-inf"))
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, (topk, BLOCK))
    return (within(weights)[..., None] * vals).sum((-3, -2)).flatten(1, 2)


def dense_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 16,
    sees: Comparison = operator.ge,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    values: Change = keep,
) -> Tensor:
    """A window over all keys at once; weights by hand, divided by their sum after the values were summed."""
    k, v = heads(k, GROUP), values(heads(v, GROUP))
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    logits = (q.unsqueeze(3) * k.unsqueeze(2) * SCALE).sum(-1)
    logits = logits.masked_fill(~(sees(i, j) & (i - j < window)), float("-inf"))
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return (weights[..., None] * v[:, :, None]).sum(3) / weights.sum(-1, keepdim=True)


def mask_in_baddbmm(
    q: Tensor, k: Tensor, v: Tensor, *, fill: float = float("-inf"), alpha: float = SCALE, beta: float = 1.0, values: Change = keep
) -> Tensor:
    """The additive mask is the first argument of `baddbmm`; heads folded into the batch."""
    b, h, n, d = q.shape
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(b, k.shape[1], n, n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    visible = chosen.repeat_interleave(BLOCK, -1).repeat_interleave(GROUP, 1) & torch.ones(n, n, dtype=torch.bool).tril()
    bias = torch.zeros(b, h, n, n).masked_fill(~visible, fill).flatten(0, 1)
    k, v = (interleave(x, GROUP).flatten(0, 1) for x in (k, values(v)))
    logits = torch.baddbmm(bias, q.flatten(0, 1), k.transpose(1, 2), beta=beta, alpha=alpha)
    return torch.bmm(logits.softmax(-1), v).unflatten(0, (b, h))


SPELLINGS: tuple[Spelling, ...] = (
    spell(
        gathered_products,
        Kind.S2,
        Mutant("blocks twice as long", {"block": 2 * BLOCK}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("strict causality", {"sees": operator.lt}, must_refuse=True),
        Mutant("values of the next key", {"values": rolled}),
        Mutant("softmax over the queries", {"axis": -2}, must_refuse=True),
    ),
    spell(
        gathered_slots,
        Kind.S2,
        Mutant("two blocks", {"topk": 2}),
        Mutant("weights in another order", {"within": flipped}, must_refuse=True),
        Mutant("weights of the next slot", {"within": rolled}, must_refuse=True),
    ),
    spell(
        dense_products,
        Kind.WINDOW,
        Mutant("window 15", {"window": 15}),
        Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("values of the next key", {"values": rolled}),
        role="sliding_window",
    ),
    spell(
        mask_in_baddbmm,
        Kind.S4,
        Mutant("a fill that leaks", {"fill": -4.0}, must_refuse=True),
        Mutant("scale doubled", {"alpha": 2 * SCALE}),
        Mutant("the mask is ignored", {"beta": 0.0}, must_refuse=True),
        Mutant("values of the next key", {"values": flipped}),
    ),
)
