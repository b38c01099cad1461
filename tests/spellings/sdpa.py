"""S5: the mask of the selection goes into `F.scaled_dot_product_attention`."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import (
    BLOCK,
    GROUP,
    QKV_BNHD,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    choose_blocks,
    flipped,
    interleave,
    keep,
    rolled,
    spell,
    swapped,
    tile,
)

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def bool_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    sees: Comparison = operator.ge,
    scale: float | None = None,
) -> Tensor:
    """Boolean mask, keys and values repeated, default scale. The own block is forced: no row is empty."""
    b, hkv, n, _ = k.shape
    indices = choose_blocks(q, k, block=block, force_own=True)
    chosen = torch.zeros(b, hkv, n, n // block, dtype=torch.bool).scatter_(-1, indices, True)
    position = torch.arange(n)
    visible = chosen.repeat_interleave(block, dim=-1) & sees(position[:, None], position)
    mask = visible.repeat_interleave(GROUP, dim=1)
    return F.scaled_dot_product_attention(q, heads(k, GROUP), heads(v, GROUP), attn_mask=mask, scale=scale)


def float_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    masked: float = float("-inf"),
    shift: int = 1,
    values: Change = keep,
) -> Tensor:
    """Additive float mask: 0 where the block is listed and the key is not in the future."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = F.one_hot(indices, n // BLOCK).any(dim=-2)
    hidden = ~chosen[..., torch.arange(n) // BLOCK] | torch.ones(n, n, dtype=torch.bool).triu(shift)
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, masked)
    return F.scaled_dot_product_attention(
        q, interleave(k, GROUP), interleave(values(v), GROUP), attn_mask=interleave(bias, GROUP)
    )


def enable_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int = TOP_K,
    scale: float = SCALE,
    keys: Change = keep,
    per_head: Callable[[Tensor, int], Tensor] = interleave,
) -> Tensor:
    """`enable_gqa=True`: SDPA repeats the heads; the layer works in BNHD and transposes at the call."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    b, hkv, n, _ = k.shape
    indices = choose_blocks(q, k, topk=topk)
    chosen = torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool).scatter_(-1, indices, True)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    mask = per_head(chosen, GROUP).repeat_interleave(BLOCK, dim=-1) & causal
    out = F.scaled_dot_product_attention(q, keys(k), v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def equality_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sees: Comparison = operator.le,
    modulus: Callable[[Tensor, int], Tensor] = operator.floordiv,
    values: Change = keep,
) -> Tensor:
    """`(idx[..., None] == block_of_key).any(-2)`, boolean, `where` into an additive mask."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    position = torch.arange(n)
    block_of_key = modulus(position, BLOCK)
    listed = (indices.unsqueeze(-1) == block_of_key.view(1, 1, 1, 1, n)).any(dim=-2)
    visible = torch.logical_and(listed, sees(position[None, :], position[:, None]))
    mask = torch.where(visible, 0.0, float("-inf")).to(q.dtype)
    mask = mask.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2)
    k = k.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2)
    v = values(v).unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask)


SPELLINGS = (
    spell(
        bool_mask,
        Kind.S5,
        Mutant("blocks of 4", {"block": 4}),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("anticausal", {"sees": operator.le}, must_refuse=True),
    ),
    spell(
        float_mask,
        Kind.S5,
        Mutant("mask leaks probability", {"masked": -2.0}, must_refuse=True),
        Mutant("own position hidden", {"shift": 0}),
        Mutant("sees one future position", {"shift": 2}),
        Mutant("rolled values", {"values": rolled}),
    ),
    spell(
        enable_gqa,
        Kind.S5,
        Mutant("two blocks", {"topk": 2}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("key heads swapped", {"keys": swapped}),
        Mutant("mask heads tiled", {"per_head": tile}),
        shapes=QKV_BNHD,
    ),
    spell(
        equality_mask,
        Kind.S5,
        Mutant("strict causality", {"sees": operator.lt}),
        Mutant("modulo for floor division", {"modulus": operator.mod}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
    ),
)
