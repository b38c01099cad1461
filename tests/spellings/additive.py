"""S4: block scores get +inf (forced) and -inf (future), and the selection is ADDED to the logits as 0 / -inf."""

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

INF = float("inf")


def gate_per_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    values: Change = keep,
    diagonal: int = 1,
    axis: int = -1,
) -> Tensor:
    """One gate per query and query head: scores of mean keys, own block +inf, future -inf; `-inf` bias, scattered 0."""
    b, h, n, d = q.shape
    k, v = k.repeat_interleave(GROUP, 1), values(v).repeat_interleave(GROUP, 1)
    gate = q @ k.reshape(b, h, n // block, block, d).mean(3).transpose(-2, -1)
    own = (torch.arange(n) // block)[:, None]
    blocks = torch.arange(n // block)[None]
    gate = gate.masked_fill(blocks == own, INF).masked_fill(blocks > own, -INF)
    bias = torch.full_like(gate, -INF).scatter_(-1, gate.topk(TOP_K, dim=-1).indices, 0.0)
    bias = bias.repeat_interleave(block, dim=-1)
    causal = torch.full((n, n), -INF).triu(diagonal)
    logits = q @ k.transpose(-2, -1) / d**0.5 + bias + causal
    return torch.softmax(logits, dim=axis) @ v


def gate_per_query_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_block: int = BLOCK,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    scale: float = SCALE,
    sees: Comparison = operator.gt,
) -> Tensor:
    """One selection for each block of queries, expanded to its queries and to tokens."""
    b, hkv, n, d = k.shape
    rows, columns = n // query_block, n // BLOCK
    queries = q.view(b, hkv, GROUP, rows, query_block, d).mean((2, 4))
    gate = torch.einsum("bhrd,bhcd->bhrc", queries, k.view(b, hkv, columns, BLOCK, d).mean(3))
    first = torch.arange(rows)[:, None] * query_block // BLOCK
    gate = gate.masked_fill(torch.arange(columns) > first, -INF)
    gate = gate.masked_fill(torch.arange(columns) == first, INF)
    bias = torch.zeros_like(gate).masked_fill(~F.one_hot(gate.topk(TOP_K).indices, columns).sum(-2).bool(), -INF)
    bias = bias.repeat_interleave(query_block, 2).repeat_interleave(BLOCK, 3)
    future = sees(torch.arange(n)[None, :], torch.arange(n)[:, None])
    logits = torch.einsum("bhid,bhjd->bhij", q, heads(k, GROUP)) * scale + interleave(bias, GROUP)
    weights = logits.masked_fill(future, -INF).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, heads(v, GROUP))


def indexer_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    forced: int = 0,
    topk: int = TOP_K,
    values: Change = keep,
    masked: float = torch.finfo(torch.float32).min,
) -> Tensor:
    """Block score = max over the block's keys of the masked logit, as an indexer does; bias of `finfo.min`, `where` last."""
    n = k.shape[2]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    k, v = interleave(k, GROUP), interleave(values(v), GROUP)
    scores = torch.matmul(q, k.transpose(2, 3)).masked_fill(~causal, -INF)
    scores = scores.view(*scores.shape[:-1], n // BLOCK, BLOCK).amax(-1)
    local = torch.arange(n // BLOCK)[None, :] == (torch.arange(n)[:, None] // BLOCK - forced)
    scores = scores.masked_fill(local, INF)
    indices = scores.topk(topk, dim=-1, sorted=False).indices
    bias = torch.full_like(scores, masked).scatter(-1, indices, 0.0)
    bias = torch.where(causal, bias.repeat_interleave(BLOCK, dim=-1), masked)
    logits = torch.matmul(q, k.transpose(2, 3)) * SCALE + bias
    return torch.matmul(F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype), v)


def gate_into_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sees: Comparison = operator.le,
    scale: float = SCALE,
    keys: Change = keep,
    group_axis: int = 2,
) -> Tensor:
    """BNHD; mean gate of the group, additive mask of the group into SDPA (S4 and S5 at once)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    b, hkv, n, d = k.shape
    gate = torch.einsum("bhgid,bhcd->bhgic", q.view(b, hkv, GROUP, n, d), k.unflatten(2, (-1, BLOCK)).mean(3)).mean(2)
    own, blocks = torch.arange(n).view(n, 1) // BLOCK, torch.arange(n // BLOCK)
    gate = torch.where(blocks > own, -INF, torch.where(blocks == own, INF, gate))
    _, indices = torch.topk(gate, TOP_K, dim=-1)
    bias = torch.full((b, hkv, n, n // BLOCK), -INF).scatter(3, indices, 0.0)[..., torch.arange(n) // BLOCK]
    bias = bias.masked_fill(~sees(torch.arange(n), torch.arange(n).view(n, 1)), -INF)
    sizes = (b, hkv, GROUP, n, n) if group_axis == 2 else (b, GROUP, hkv, n, n)
    bias = bias.unsqueeze(group_axis).expand(sizes).reshape(b, hkv * GROUP, n, n)
    k, v = interleave(keys(k), GROUP), interleave(v, GROUP)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)


SPELLINGS = (
    spell(
        gate_per_query,
        Kind.S4,
        Mutant("blocks of 4", {"block": 4}),
        Mutant("value heads swapped", {"values": swapped}),
        Mutant("strict causality", {"diagonal": 0}, must_refuse=True),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
    ),
    spell(
        gate_per_query_block,
        Kind.S4,
        Mutant("query blocks of 4", {"query_block": 4}),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("own position hidden", {"sees": operator.ge}, must_refuse=True),
    ),
    spell(
        indexer_bias,
        Kind.S4,
        Mutant("previous block forced", {"forced": 1}),
        Mutant("two blocks", {"topk": 2}),
        Mutant("bias leaks probability", {"masked": -3.0}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        gate_into_sdpa,
        Kind.S4,
        Mutant("anticausal", {"sees": operator.ge}, must_refuse=True),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("rolled keys", {"keys": rolled}),
        Mutant("mask heads tiled", {"group_axis": 1}),
        shapes=QKV_BNHD,
    ),
)
