"""Branches in einops and einx: Dynamo sees through both, and what is left are the ops that they are made of."""

from __future__ import annotations

from collections.abc import Callable

import einx
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from .spelling import (
    BATCH,
    BLOCK,
    GROUP,
    KV_HEADS,
    LENGTH,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    Spelling,
    choose_blocks,
    flipped,
    keep,
    rolled,
    spell,
)

Change = Callable[[Tensor], Tensor]
BLOCKS = LENGTH // BLOCK


def einops_dense(
    q: Tensor, k: Tensor, v: Tensor, *, heads: str = "b (h g) n d", topk: int = TOP_K, scale: float = SCALE, values: Change = keep
) -> Tensor:
    """`repeat` makes the token mask and the heads, `einsum` with names the products."""
    indices = choose_blocks(q, k, topk=topk, force_own=True)
    chosen = torch.zeros(BATCH, KV_HEADS, LENGTH, BLOCKS, dtype=torch.bool).scatter(-1, indices, True)
    chosen = repeat(chosen, "b h i w -> b (h g) i (w c)", g=GROUP, c=BLOCK)
    position = torch.arange(LENGTH)
    causal = rearrange(position, "i -> i 1") >= rearrange(position, "j -> 1 j")
    k, v = (repeat(x, f"b h n d -> {heads}", g=GROUP) for x in (k, values(v)))
    logits = einsum(q, k, "b h i d, b h j d -> b h i j") * scale
    logits = logits.masked_fill(~(chosen & causal), -torch.finfo(logits.dtype).max)
    return einsum(logits.softmax(-1), v, "b h i j, b h j d -> b h i d")


def einops_gather(
    q: Tensor, k: Tensor, v: Tensor, *, inside: str = "(t c)", late: int = 0, scale: float = SCALE, values: Change = keep
) -> Tensor:
    """`einx.get_at` gathers blocks, `einx.add` makes positions; `inside` orders the gathered values."""
    indices = choose_blocks(q, k, force_own=True)
    blocks = (rearrange(x, "b h (w c) d -> b h w c d", c=BLOCK) for x in (k, values(v)))
    keys, vals = (einx.get_at("b h [w] c d, b h i t -> b h i t c d", x, indices) for x in blocks)
    keys = rearrange(keys, "b h i t c d -> b h i (t c) d")
    vals = rearrange(vals, f"b h i t c d -> b h i {inside} d")
    position = einx.add("b h i t, c -> b h i t c", indices * BLOCK, torch.arange(BLOCK))
    seen = rearrange(torch.arange(LENGTH), "i -> i 1") >= rearrange(position, "b h i t c -> b h 1 i (t c)") + late
    logits = einsum(rearrange(q, "b (h g) i d -> b h g i d", g=GROUP), keys, "b h g i d, b h i j d -> b h g i j") * scale
    weights = logits.masked_fill(~seen, -torch.finfo(logits.dtype).max).softmax(-1)
    return rearrange(einsum(weights, vals, "b h g i j, b h i j d -> b h g i d"), "b h g i d -> b (h g) i d")


def einx_dense(
    q: Tensor, k: Tensor, v: Tensor, *, order: str = "j, i -> i j", fill: float = -1e9, topk: int = TOP_K, values: Change = keep
) -> Tensor:
    """einx throughout: membership by `equal` and `any`, repetition by `id`, products by `dot`."""
    indices = choose_blocks(q, k, topk=topk, force_own=True)
    chosen = einx.any("b h i [t] w", einx.equal("b h i t, w -> b h i t w", indices, torch.arange(BLOCKS)))
    chosen = einx.id("b h i w -> b (h g) i (w c)", chosen, g=GROUP, c=BLOCK)
    causal = einx.less_equal(order, torch.arange(LENGTH), torch.arange(LENGTH))
    k, v = (einx.id("b h n d -> b (h g) n d", x, g=GROUP) for x in (k, values(v)))
    logits = einx.dot("b h i [d], b h j [d] -> b h i j", q, k) * SCALE
    visible = einx.logical_and("b h i j, i j", chosen, causal)
    weights = einx.softmax("b h i [j]", einx.where("b h i j, b h i j, ", visible, logits, fill))
    return einx.dot("b h i [j], b h [j] d -> b h i d", weights, v)


SPELLINGS: tuple[Spelling, ...] = (
    spell(
        einops_dense,
        Kind.S1,
        Mutant("heads tiled", {"heads": "b (g h) n d"}),
        Mutant("one block", {"topk": 1}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("values of the next key", {"values": rolled}),
    ),
    spell(
        einops_gather,
        Kind.S2,
        Mutant("values in another order", {"inside": "(c t)"}, must_refuse=True),
        Mutant("strict causality", {"late": 1}, must_refuse=True),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("values in reverse order", {"values": flipped}),
    ),
    spell(
        einx_dense,
        Kind.S1,
        Mutant("sees the future only", {"order": "i, j -> i j"}, must_refuse=True),
        Mutant("a fill that leaks", {"fill": -4.0}, must_refuse=True),
        Mutant("one block", {"topk": 1}),
        Mutant("values of the next key", {"values": rolled}),
    ),
)
