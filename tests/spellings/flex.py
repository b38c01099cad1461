"""S6: `flex_attention`, with the visibility in a block mask, in the score function, or in both.

Forward only: on a CPU torch's `flex_attention` has no backward pass and raises where an input needs a gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from .spelling import (
    BATCH,
    BLOCK,
    GROUP,
    HEADS,
    QKV,
    QKV_BNHD,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    Spelling,
    choose_blocks,
    keep,
    rolled,
    spell,
)

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]

TILE = 32
"""Block size of the block masks, which has nothing to do with that of the selection."""


def grouped(h: Tensor) -> Tensor:
    """The key head of a query head."""
    return h // GROUP


def tiled(h: Tensor) -> Tensor:
    """The key head of a query head if key heads were tiled, the classic mistake."""
    return h % (HEADS // GROUP)


def table_in_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int = TOP_K,
    sees: Comparison = operator.le,
    heads: Change = grouped,
    chosen: Change = keep,
) -> Tensor:
    """A table of chosen blocks (b, hkv, n, blocks), made by scatter and captured by the mask function."""
    b, hkv, n, _ = k.shape
    indices = choose_blocks(q, k, topk=topk, force_own=True)
    table = chosen(torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool).scatter(-1, indices, True))

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[b, heads(h), i, j // BLOCK] & sees(j, i)

    mask = create_block_mask(mask_mod, BATCH, HEADS, n, n, device="cpu", BLOCK_SIZE=TILE)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def list_in_block_mask(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = BLOCK, scale: float = SCALE, sees: Comparison = operator.ge
) -> Tensor:
    """The list itself is captured, and compared with the key's block; two mask functions are joined."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)

    def listed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (indices[b, h // GROUP, i] == j // block).any()

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(i, j)

    mask = create_block_mask(and_masks(listed, causal), BATCH, HEADS, n, n, device="cpu", BLOCK_SIZE=(TILE, 2 * TILE))
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


def table_in_score_mod(
    q: Tensor, k: Tensor, v: Tensor, *, fill: float = float("-inf"), factor: float = 1.0, chosen: Change = keep
) -> Tensor:
    """The selection in the score function, which also scales; causality in the block mask, the same for all heads."""
    b, hkv, n, _ = k.shape
    indices = choose_blocks(q, k, force_own=True)
    table = chosen(torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool).scatter(-1, indices, True))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(table[b, h // GROUP, i, j // BLOCK], score * factor, fill)

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(causal, None, None, n, n, device="cpu", BLOCK_SIZE=TILE)
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)


def band_in_block_mask(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 16, sees: Comparison = operator.le, within: Comparison = operator.lt
) -> Tensor:
    """A sliding window, positions before heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    n = k.shape[2]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(j, i) & within(i - j, window)

    mask = create_block_mask(mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=TILE)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def band_in_score_mod(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 16, slope: float = 0.0, fill: float = float("-inf")
) -> Tensor:
    """A sliding window without any block mask; `slope` adds a bias that grows with the distance."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if slope:
            score = score - slope * (i - j)
        return torch.where((j <= i) & (i - j < window), score, fill)

    return flex_attention(q, k, v, score_mod=score_mod, enable_gqa=True)


def compressed_keys(q: Tensor, k: Tensor, v: Tensor, *, last: int = BLOCK - 1, stride: int = BLOCK, scale: float = SCALE) -> Tensor:
    """Keys are means of blocks; early queries see none of them, and flex_attention gives them zeros."""
    small_k, small_v = (x.unflatten(2, (-1, BLOCK)).mean(3) for x in (k, v))

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, c: Tensor) -> Tensor:
        return i >= c * stride + last

    mask = create_block_mask(mask_mod, None, None, q.shape[2], small_k.shape[2], device="cpu", BLOCK_SIZE=TILE)
    return flex_attention(q, small_k, small_v, block_mask=mask, scale=scale, enable_gqa=True)


SPELLINGS: tuple[Spelling, ...] = (
    spell(
        table_in_block_mask,
        Kind.S6,
        Mutant("one block", {"topk": 1}),
        Mutant("strict causality", {"sees": operator.lt}, must_refuse=True),
        Mutant("the selection of the tiled head", {"heads": tiled}),
        Mutant("the selection of the next query", {"chosen": rolled}),
    ),
    spell(
        list_in_block_mask,
        Kind.S6,
        Mutant("blocks twice as long", {"block": 2 * BLOCK}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("the future of the blocks", {"sees": operator.ne}, must_refuse=True),
    ),
    spell(
        table_in_score_mod,
        Kind.S6,
        Mutant("a fill that leaks", {"fill": -4.0}, must_refuse=True),
        Mutant("logits doubled", {"factor": 2.0}),
        Mutant("the selection of the next query", {"chosen": rolled}),
    ),
    spell(
        band_in_block_mask,
        Kind.S6,
        Mutant("window 15", {"window": 15}),
        Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
        Mutant("one key more", {"within": operator.le}),
        role="sliding_window",
        shapes=QKV_BNHD,
    ),
    spell(
        band_in_score_mod,
        Kind.S6,
        Mutant("window 17", {"window": 17}),
        Mutant("a bias by distance", {"slope": 0.1}, must_refuse=True),
        Mutant("a fill that leaks", {"fill": -4.0}, must_refuse=True),
        role="sliding_window",
    ),
    spell(
        compressed_keys,
        Kind.S6,
        Mutant("the own block leaks", {"last": BLOCK - 2}),
        Mutant("stride one less", {"stride": BLOCK - 1}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        role="compressed",
        shapes=QKV,
    ),
)
