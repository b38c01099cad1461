"""S1 again, with the logits in other shapes: grouped, flattened, viewed in blocks, or with keys down the rows."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import (
    BLOCK,
    GROUP,
    KV_HEADS,
    QKV,
    SCALE,
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


def group_by_interleave(q: Tensor) -> Tensor:
    """(b, hq, n, d) to (b, hkv, g, n, d): query head h in group h // g."""
    return q.view(q.shape[0], KV_HEADS, GROUP, *q.shape[2:])


def group_by_tile(q: Tensor) -> Tensor:
    """(b, hq, n, d) to (b, hkv, g, n, d): query head h in group h % hkv."""
    return q.view(q.shape[0], GROUP, KV_HEADS, *q.shape[2:]).transpose(1, 2)


def grouped_einsum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grouped: Change = group_by_interleave,
    values: Change = keep,
    scale: float = SCALE,
    axis: int = -1,
) -> Tensor:
    """GQA without a repeat: q as (b, hkv, g, n, d), einsum over the group."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros_like(indices[..., :1], dtype=torch.bool).expand(-1, -1, -1, n // BLOCK).scatter(-1, indices, True)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    visible = (chosen[..., None].expand(*chosen.shape, BLOCK).flatten(-2) & causal).unsqueeze(2)
    logits = torch.einsum("bhgid,bhjd->bhgij", grouped(q), k) * scale
    logits = logits.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhgij,bhjd->bhgid", logits.softmax(axis), values(v)).flatten(1, 2)


def blocked_logits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    token_axis: int = -1,
    scale: float = SCALE,
    values: Change = keep,
) -> Tensor:
    """The logits are viewed as (..., blocks, B) and masked by block, then by position."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(*indices.shape[:3], n // BLOCK).scatter_(-1, indices, 1.0).bool().repeat_interleave(GROUP, 1)
    logits = q @ interleave(k, GROUP).transpose(2, 3) * scale
    sizes = (n // BLOCK, BLOCK) if token_axis == -1 else (BLOCK, n // BLOCK)
    logits = logits.unflatten(-1, sizes).masked_fill(~chosen.unsqueeze(token_axis), float("-inf")).flatten(-2)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    logits = logits.masked_fill(future, float("-inf"))
    return logits.softmax(-1) @ interleave(values(v), GROUP)


def flat_heads_bmm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    axis: int = 2,
    sees: Comparison = operator.ge,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Batch and heads flattened into one axis, `bmm`, the scale on the query, probabilities cast back to the model's dtype."""
    b, h, n, d = q.shape
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(b, KV_HEADS, n, n // BLOCK, dtype=torch.bool).scatter_(-1, indices, True)
    position = torch.arange(n)
    visible = chosen.repeat_interleave(BLOCK, -1) & sees(position[:, None], position)
    visible = interleave(visible, GROUP).reshape(b * h, n, n)
    query = (q * d**-0.5).reshape(b * h, n, d)
    keys = heads(k, GROUP).reshape(b * h, n, d)
    logits = torch.bmm(query, keys.transpose(1, 2)).masked_fill(~visible, float("-inf"))
    weights = F.softmax(logits, dim=axis).to(precision).to(v.dtype)
    out = torch.bmm(weights, heads(v, GROUP).reshape(b * h, n, d))
    return out.view(b, h, n, d)


def keys_transposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shift: int = 0,
    scale: float = SCALE,
    values: Change = keep,
) -> Tensor:
    """Keys are stored (b, hkv, d, n), as a cache may; `shift` moves the causal diagonal."""
    n = v.shape[2]
    indices = choose_blocks(q, k.transpose(2, 3), force_own=True)
    chosen = torch.zeros(q.shape[0], KV_HEADS, n, n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    visible = chosen.repeat_interleave(BLOCK, -1) & torch.ones(n, n, dtype=torch.bool).tril(shift)
    logits = torch.matmul(q, interleave(k, GROUP)) * scale
    logits = logits + torch.zeros_like(logits).masked_fill(~interleave(visible, GROUP), float("-inf"))
    return torch.matmul(logits.softmax(-1), interleave(values(v), GROUP))


def keys_by_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int = -2,
    scale: float = SCALE,
    values: Change = keep,
) -> Tensor:
    """Logits as K Q^T: keys run down the rows, so that here the softmax over axis -2 is the one over keys."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(*indices.shape[:3], n // BLOCK, dtype=torch.bool).scatter_(-1, indices, True)
    visible = chosen.repeat_interleave(BLOCK, -1).mT & torch.ones(n, n, dtype=torch.bool).triu()
    logits = interleave(k, GROUP) @ q.transpose(-2, -1) * scale
    logits = logits + (1.0 - interleave(visible, GROUP).float()) * -1e9
    return logits.softmax(axis).transpose(-2, -1) @ interleave(values(v), GROUP)


STRICT = {"sees": operator.gt}
"""Instead of `i >= j`: the first query sees nothing, which no op answers as the user's softmax does."""

SPELLINGS = (
    spell(
        grouped_einsum,
        Kind.S1,
        Mutant("queries grouped by tile", {"grouped": group_by_tile}),
        Mutant("value heads swapped", {"values": swapped}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
    ),
    spell(
        blocked_logits,
        Kind.S1,
        Mutant("blocks interleaved", {"token_axis": -2}, must_refuse=True),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        flat_heads_bmm,
        Kind.S1,
        Mutant("heads tiled", {"heads": tile}),
        Mutant("softmax over queries", {"axis": 1}, must_refuse=True),
        Mutant("probabilities rounded to bfloat16", {"precision": torch.bfloat16}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
    ),
    spell(
        keys_transposed,
        Kind.S1,
        Mutant("sees one future position", {"shift": 1}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("rolled values", {"values": rolled}),
        shapes=(QKV[0], (QKV[1][0], QKV[1][1], QKV[1][3], QKV[1][2]), QKV[2]),
    ),
    spell(
        keys_by_queries,
        Kind.S1,
        Mutant("softmax over queries", {"axis": -1}, must_refuse=True),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("value heads swapped", {"values": swapped}),
    ),
)
