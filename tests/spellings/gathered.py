"""S2: each query gathers its blocks of keys and values and attends to those only."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import (
    BLOCK,
    GROUP,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    choose_blocks,
    flipped,
    keep,
    rolled,
    spell,
    swapped,
)

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def gather_expanded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    sees: Comparison = operator.ge,
    values: Change = keep,
    axis: int = -1,
) -> Tensor:
    """`gather` from blocks expanded over the queries, einsum over (t, B), mask on the gathered positions."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, block=block, force_own=True)
    picked = indices[..., None, None].expand(-1, -1, -1, -1, block, d)
    keys = k.view(b, hkv, 1, n // block, block, d).expand(-1, -1, n, -1, -1, -1).gather(3, picked)
    vals = v.view(b, hkv, 1, n // block, block, d).expand(-1, -1, n, -1, -1, -1).gather(3, picked)
    keys, vals = keys.flatten(3, 4), values(vals.flatten(3, 4))
    position = (indices[..., None] * block + torch.arange(block)).flatten(3)
    visible = sees(torch.arange(n)[:, None], position)
    logits = torch.einsum("bhgid,bhijd->bhgij", q.unflatten(1, (hkv, GROUP)), keys) * d**-0.5
    logits = logits.masked_fill(~visible.unsqueeze(2), torch.finfo(logits.dtype).min)
    return torch.einsum("bhgij,bhijd->bhgid", logits.softmax(axis), vals).flatten(1, 2)


def take_along_dim(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int = TOP_K,
    scale: float = SCALE,
    values: Change = keep,
    within: Change = keep,
) -> Tensor:
    """`take_along_dim` over flattened blocks; `within` reorders the gathered values inside a block."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, topk=topk, force_own=True)
    picked = indices.reshape(b, hkv, n * topk, 1)
    keys = torch.take_along_dim(k.reshape(b, hkv, n // BLOCK, BLOCK * d), picked, dim=2)
    vals = torch.take_along_dim(values(v).reshape(b, hkv, n // BLOCK, BLOCK * d), picked, dim=2)
    keys = keys.reshape(b, hkv, n, topk, BLOCK, d)
    vals = within(vals.reshape(b, hkv, n, topk, BLOCK, d))
    position = indices[..., None] * BLOCK + torch.arange(BLOCK)
    visible = position <= torch.arange(n)[:, None, None]
    logits = torch.einsum("bhgid,bhitjd->bhgitj", q.unflatten(1, (hkv, GROUP)), keys) * scale
    logits = torch.where(visible[:, :, None], logits, float("-inf"))
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, (topk, BLOCK))
    return torch.einsum("bhgitj,bhitjd->bhgid", weights, vals).flatten(1, 2)


def advanced_index(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sees: Comparison = operator.gt,
    values: Change = keep,
    stride: int = BLOCK,
) -> Tensor:
    """`k_blocks[b, h, idx]` and SDPA with one query per row; `stride` is the distance of the positions the mask assumes."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, force_own=True)
    batch = torch.arange(b).view(b, 1, 1, 1)
    head = torch.arange(hkv).view(1, hkv, 1, 1)
    keys = k.unflatten(2, (-1, BLOCK))[batch, head, indices].flatten(3, 4)
    vals = values(v).unflatten(2, (-1, BLOCK))[batch, head, indices].flatten(3, 4)
    position = (indices.unsqueeze(-1) * stride + torch.arange(BLOCK)).flatten(-2)
    mask = ~sees(position, torch.arange(n).unsqueeze(-1))
    queries = q.unflatten(1, (hkv, GROUP)).transpose(2, 3)
    out = F.scaled_dot_product_attention(queries, keys, vals, attn_mask=mask.unsqueeze(3))
    return out.transpose(2, 3).flatten(1, 2)


def own_block_appended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    own_times: int = 1,
    sees: Comparison = operator.ge,
    scale: float = SCALE,
    past: Comparison = operator.ge,
) -> Tensor:
    """Picks among the past only, unusable ones set to -1 by their score, the own block appended by `cat`."""
    b, hkv, n, d = k.shape
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    scores = torch.einsum("bhgid,bhcd->bhic", q.unflatten(1, (hkv, GROUP)), pooled) * d**-0.5
    own = torch.arange(n)[:, None] // BLOCK
    scores = scores.masked_fill(past(torch.arange(n // BLOCK), own), -1e9)
    top = scores.topk(TOP_K - 1, dim=-1)
    picks = torch.where(top.values > -1e8, top.indices, -1)
    indices = torch.cat((picks, own.expand(b, hkv, n, own_times)), dim=-1)
    tokens = indices[..., None] * BLOCK + torch.arange(BLOCK)
    visible = (sees(torch.arange(n)[:, None, None], tokens) & (indices >= 0)[..., None]).flatten(3)
    tokens = tokens.clamp(min=0).flatten(3)
    where = tokens.flatten(2)[..., None].expand(-1, -1, -1, d)
    keys = k.gather(2, where).view(b, hkv, n, -1, d)
    vals = v.gather(2, where).view(b, hkv, n, -1, d)
    logits = torch.einsum("bhgid,bhijd->bhgij", q.unflatten(1, (hkv, GROUP)), keys) * scale
    logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    return torch.einsum("bhgij,bhijd->bhgid", logits.softmax(-1), vals).flatten(1, 2)


def probability_threshold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float = 1e-10,
    own_times: int = 1,
    sees: Comparison = operator.ge,
    values: Change = keep,
) -> Tensor:
    """Picks by softmax probability: a future block has probability 0 and fails the threshold; own block appended."""
    b, hkv, n, d = k.shape
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    importance = torch.einsum("bhgid,bhcd->bhgic", q.unflatten(1, (hkv, GROUP)), pooled).mean(2) * d**-0.5
    own = torch.arange(n).unsqueeze(-1) // BLOCK
    importance = importance.masked_fill(torch.arange(n // BLOCK) >= own, -torch.finfo(q.dtype).max)
    # A pad of one zero score keeps the first block's queries from spreading probability over the future.
    importance = F.pad(importance, (1, 0)).softmax(-1)[..., 1:]
    probability, indices = importance.topk(TOP_K - 1, dim=-1)
    usable = F.pad(probability > threshold, (0, own_times), value=True)[..., None].expand(-1, -1, -1, -1, BLOCK)
    indices = torch.cat((indices, own.expand(b, hkv, n, own_times)), dim=-1)
    batch, head = torch.arange(b)[:, None, None, None], torch.arange(hkv)[:, None, None]
    keys = k.unflatten(2, (-1, BLOCK))[batch, head, indices]
    vals = values(v).unflatten(2, (-1, BLOCK))[batch, head, indices]
    inside = sees(torch.arange(n) % BLOCK, torch.arange(BLOCK)[:, None]).mT.expand(b, hkv, n, BLOCK)[:, :, :, None]
    visible = torch.cat((usable[..., :-own_times, :], usable[..., -own_times:, :] & inside), dim=-2)
    logits = torch.einsum("bhgid,bhitjd->bhgitj", q.unflatten(1, (hkv, GROUP)), keys) * d**-0.5
    logits = logits.masked_fill(~visible.unsqueeze(2), -torch.finfo(logits.dtype).max)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhgitj,bhitjd->bhgid", weights, vals).flatten(1, 2)


def token_gather_per_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int = -1,
    values: Change = keep,
    sees: Comparison = operator.gt,
) -> Tensor:
    """Selection per query head; token numbers, then `gather` from (b, h, n, n, d) views; `matmul` with one row per query."""
    b, h, n, d = q.shape
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    indices = choose_blocks(q, k, force_own=True)
    tokens = (indices[..., None] * BLOCK + torch.arange(BLOCK)).view(b, h, n, TOP_K * BLOCK)
    where = tokens[..., None].expand(*tokens.shape, d)
    keys = torch.gather(k[:, :, None].expand(b, h, n, n, d), 3, where)
    vals = torch.gather(v[:, :, None].expand(b, h, n, n, d), 3, where)
    logits = (q.unsqueeze(3) @ keys.transpose(3, 4)).squeeze(3) * d**-0.5
    logits = logits.masked_fill(sees(tokens, torch.arange(n)[:, None]), -1e9)
    return (logits.softmax(axis).unsqueeze(3) @ values(vals)).squeeze(3)


def query_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sees: Comparison = operator.ge,
    values: Change = keep,
    minor: Change = keep,
    chosen: Change = keep,
) -> Tensor:
    """A block of queries shares its list; projections ``(b, n, h * d)`` are viewed as blocks at once, so that no tensor has
    keys and heads as dimensions of their own."""
    b, hkv, n, d = k.shape
    blocks = n // BLOCK
    indices = chosen(choose_blocks(q, k, force_own=True)[:, :, ::BLOCK])
    batch, head = torch.arange(b).view(b, 1, 1, 1), torch.arange(hkv).view(hkv, 1, 1)

    def projected(t: Tensor) -> Tensor:
        return F.linear(t.transpose(1, 2).flatten(2), torch.eye(t.shape[1] * d))

    keys = projected(k).view(b, blocks, BLOCK, hkv, d).permute(0, 3, 1, 2, 4)[batch, head, indices]
    vals = minor(projected(values(v)).view(b, blocks, BLOCK, hkv, d)).permute(0, 3, 1, 2, 4)[batch, head, indices]
    queries = projected(q).view(b, blocks, BLOCK, hkv, GROUP, d)
    logits = torch.einsum("bqihgd,bhqtjd->bhgqitj", queries, keys) * d**-0.5
    position = (indices[..., None] * BLOCK + torch.arange(BLOCK))[:, :, None, :, None]
    visible = sees(torch.arange(n).view(blocks, BLOCK, 1, 1), position)
    weights = logits.masked_fill(~visible, float("-inf")).flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhgqitj,bhqtjd->bhgqid", weights, vals).reshape(b, hkv * GROUP, n, d)


def heads_minor(t: Tensor) -> Tensor:
    """(b, blocks, B, h, d) from the same elements, counted with the heads innermost."""
    return t.flatten(-2).unflatten(-1, (t.shape[-1], t.shape[-2])).transpose(-1, -2)


def next_block(t: Tensor) -> Tensor:
    """(b, h, blocks, t): each block of queries gets the list of the one before."""
    return t.roll(1, 2)


SPELLINGS = (
    spell(
        gather_expanded,
        Kind.S2,
        Mutant("blocks of 4", {"block": 4}),
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
        Mutant("values rolled after the gather", {"values": rolled}, must_refuse=True),
        Mutant("softmax over the group", {"axis": 2}, must_refuse=True),
    ),
    spell(
        take_along_dim,
        Kind.S2,
        Mutant("two blocks", {"topk": 2}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("value heads swapped", {"values": swapped}),
        Mutant("values flipped within a block", {"within": flipped}),
    ),
    spell(
        advanced_index,
        Kind.S2,
        Mutant("own position hidden", {"sees": operator.ge}),
        Mutant("rolled values", {"values": rolled}),
        Mutant("positions in blocks of 7", {"stride": BLOCK - 1}, must_refuse=True),
    ),
    spell(
        own_block_appended,
        Kind.S2,
        Mutant("own block twice", {"own_times": 2}, must_refuse=True),
        Mutant("own block may be picked as well", {"past": operator.gt}, must_refuse=True),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
    ),
    spell(
        probability_threshold,
        Kind.S2,
        Mutant("own block twice", {"own_times": 2}, must_refuse=True),
        Mutant("threshold drops likely blocks", {"threshold": 0.1}),
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        token_gather_per_head,
        Kind.S2,
        Mutant("softmax over queries", {"axis": 2}, must_refuse=True),
        Mutant("values rolled after the gather", {"values": rolled}, must_refuse=True),
        Mutant("own position hidden", {"sees": operator.ge}, must_refuse=True),
    ),
    spell(
        query_blocks,
        Kind.S2,
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
        Mutant("value heads swapped", {"values": swapped}),
        Mutant("rolled values", {"values": rolled}),
        Mutant("value heads counted innermost", {"minor": heads_minor}),
        Mutant("lists of the block before", {"chosen": next_block}),
    ),
)
