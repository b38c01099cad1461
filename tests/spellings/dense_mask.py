"""S1: the selection becomes a dense boolean mask over all keys, and attention is the usual softmax.

`topk -> zeros(bool).scatter_(-1, idx, True) -> tokens -> & causal -> masked_fill -> softmax -> @ V`, the most common spelling.
"""

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


def scatter_then_index(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sees: Comparison = operator.ge,
    axis: int = -1,
    values: Change = keep,
    heads: Callable[[Tensor, int], Tensor] = interleave,
) -> Tensor:
    """`scatter_(True)` into blocks, `[..., tok // B]` to tokens, -inf, BHND, `repeat_interleave` for GQA."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k)
    chosen = torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool).scatter_(-1, indices, True)
    position = torch.arange(n)
    visible = chosen[..., position // BLOCK] & sees(position[:, None], position[None, :])
    k, v = heads(k, GROUP), heads(values(v), GROUP)
    logits = torch.matmul(q, k.transpose(-2, -1)) * d**-0.5
    logits = logits.masked_fill(~visible.repeat_interleave(GROUP, dim=1), float("-inf"))
    return torch.matmul(torch.softmax(logits, dim=axis), v)


def widen_by_repeat(x: Tensor, block: int) -> Tensor:
    """(..., blocks) to (..., n): token j belongs to block j // B."""
    return x.repeat_interleave(block, dim=-1)


def widen_by_tile(x: Tensor, block: int) -> Tensor:
    """(..., blocks) to (..., n) with token j in block j % blocks: tile for interleave."""
    return x.repeat(1, 1, 1, block)


def repeat_then_where(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    widen: Callable[[Tensor, int], Tensor] = widen_by_repeat,
    scale: float = SCALE,
    sees: Comparison = operator.ge,
) -> Tensor:
    """`repeat_interleave(B)` to tokens, `torch.where` with `finfo.min`, own block forced."""
    b, hkv, n, _ = k.shape
    indices = choose_blocks(q, k, block=block, force_own=True)
    chosen = torch.zeros((b, hkv, n, n // block), dtype=torch.bool).scatter(-1, indices, True)
    position = torch.arange(n)
    visible = widen(chosen, block) & sees(position.unsqueeze(-1), position)
    visible = visible.repeat_interleave(GROUP, dim=1)
    logits = (q @ k.repeat_interleave(GROUP, dim=1).mT) * scale
    logits = torch.where(visible, logits, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1) @ v.repeat_interleave(GROUP, dim=1)


def bnhd_expand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    fill: float = -1e9,
    sees: Comparison = operator.le,
    axis: int = -1,
    topk: int = TOP_K,
    group_axis: int = 3,
) -> Tensor:
    """BNHD with einsum, GQA by `expand` + `reshape`, fill -1e9."""
    b, n, hkv, d = k.shape
    indices = choose_blocks(q.transpose(1, 2), k.transpose(1, 2), topk=topk)
    chosen = torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool)
    chosen.scatter_(3, indices, True)
    visible = chosen.repeat_interleave(BLOCK, dim=3) & sees(torch.arange(n), torch.arange(n)[:, None])
    visible = visible[:, :, None].expand(b, hkv, GROUP, n, n).reshape(b, hkv * GROUP, n, n)
    sizes = (b, n, hkv, GROUP, d) if group_axis == 3 else (b, n, GROUP, hkv, d)
    k = k.unsqueeze(group_axis).expand(sizes).reshape(b, n, hkv * GROUP, d)
    v = v.unsqueeze(group_axis).expand(sizes).reshape(b, n, hkv * GROUP, d)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
    weights = F.softmax(logits.masked_fill(visible.logical_not(), fill), dim=axis)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def softmax_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int = -1,
    values: Change = keep,
    sees: Comparison = operator.ge,
) -> Tensor:
    """max, exp, sum and a division instead of `softmax`."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool).scatter_(-1, indices, True)
    position = torch.arange(n)
    visible = chosen[:, :, :, position // BLOCK] & sees(position.view(-1, 1), position.view(1, -1))
    visible = visible.repeat_interleave(GROUP, 1)
    logits = q @ k.repeat_interleave(GROUP, 1).transpose(-1, -2) / d**0.5
    logits = logits.masked_fill(~visible, float("-inf"))
    logits = logits - logits.amax(dim=axis, keepdim=True)
    weights = logits.exp()
    weights = weights / weights.sum(dim=axis, keepdim=True)
    return weights @ values(v).repeat_interleave(GROUP, 1)


def one_hot_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    sees: Comparison = operator.gt,
    scale: float = SCALE,
) -> Tensor:
    """Blocks by `one_hot(idx).sum(-2)`, the causal mask by the hidden half."""
    n = k.shape[2]
    indices = choose_blocks(q, k, block=block)
    chosen = F.one_hot(indices, n // block).sum(-2) > 0
    future = sees(torch.arange(n)[None, :], torch.arange(n)[:, None])
    hidden = ~chosen.repeat_interleave(block, -1) | future
    logits = torch.einsum("bhid,bhjd->bhij", q * scale, heads(k, GROUP))
    logits = logits.masked_fill(hidden.repeat_interleave(GROUP, 1), -torch.finfo(logits.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), heads(v, GROUP))


def index_put(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offset: int = 0,
    sees: Comparison = operator.ge,
    values: Change = keep,
) -> Tensor:
    """`mask[b, h, i, idx] = True`, then the own block by a second assignment; `offset` moves the tokens against the blocks."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, topk=TOP_K - 1)
    batch = torch.arange(b)[:, None, None, None]
    head = torch.arange(hkv)[None, :, None, None]
    position = torch.arange(n)
    chosen = torch.zeros(b, hkv, n, n // BLOCK, dtype=torch.bool)
    chosen[batch, head, position[None, None, :, None], indices] = True
    chosen[:, :, position, position // BLOCK] = True
    tokens = (position + offset).clamp(max=n - 1) // BLOCK
    visible = chosen[..., tokens] & sees(position[:, None], position)
    logits = (q.unflatten(1, (hkv, GROUP)) @ k.unsqueeze(2).transpose(-1, -2)) * SCALE
    logits[~visible[:, :, None].expand_as(logits)] = float("-inf")
    return (logits.softmax(-1) @ values(v).unsqueeze(2)).reshape(b, hkv * GROUP, n, d)


def equality_any(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    per_block: int = BLOCK,
    picks: int = TOP_K,
    axis: int = -1,
    values: Change = keep,
) -> Tensor:
    """`(idx[..., None] == block_of_key).any(-2)`: no scatter at all."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)[..., :picks]
    block_of_key = torch.arange(n) // per_block
    listed = (indices[..., None] == block_of_key).any(-2)
    visible = listed & torch.tril(torch.ones(n, n, dtype=torch.bool))
    visible = visible.repeat_interleave(GROUP, 1)
    logits = q @ k.repeat_interleave(GROUP, 1).transpose(-1, -2) * SCALE
    weights = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(axis)
    return weights @ values(v).repeat_interleave(GROUP, 1)


def per_query_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int = TOP_K - 1,
    sees: Comparison = operator.ge,
    order: Change = keep,
) -> Tensor:
    """Each query head selects for itself, after the keys were repeated; the own block joins by `|`."""
    b, h, n, d = q.shape
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    indices = choose_blocks(q, k, topk=topk)
    blocks = torch.arange(n // BLOCK)
    position = torch.arange(n)
    chosen = torch.zeros(b, h, n, n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    chosen = order(chosen | (blocks == (position // BLOCK)[:, None]))
    visible = chosen.repeat_interleave(BLOCK, dim=-1) & sees(position[:, None], position)
    weights = (q @ k.mT * d**-0.5).masked_fill(~visible, float("-inf")).softmax(-1)
    return weights @ v


STRICT = {"sees": operator.gt}
"""Instead of `i >= j`: the first query sees nothing, which no op answers as the user's softmax does."""

def inverse_of_a_share(
    q: Tensor, k: Tensor, v: Tensor, *, odd: float = 1.0, sees: Comparison = operator.ge, values: Change = keep
) -> Tensor:
    """Weights by hand, divided by how likely their key was to be picked: 1 + 1e-6 for all that are, so it cancels. `odd` is the
    share of the odd keys."""
    n = k.shape[2]
    position = torch.arange(n)
    indices = choose_blocks(q, k, force_own=True)
    picked = torch.zeros(*indices.shape[:3], n // BLOCK).scatter_(-1, indices, 1.0).clamp(0.0, 1.0).repeat_interleave(BLOCK, -1)
    picked = picked * sees(position[:, None], position).float() * torch.where(position % 2 == 1, odd, 1.0)
    picked = picked.repeat_interleave(GROUP, 1)
    logits = q @ k.repeat_interleave(GROUP, 1).mT * SCALE + torch.full((n, n), torch.finfo(q.dtype).min).triu(1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * (1.0 / (picked + 1e-6) * (picked != 0))
    return weights @ values(v).repeat_interleave(GROUP, 1) / weights.sum(-1, keepdim=True)


SPELLINGS = (
    spell(
        scatter_then_index,
        Kind.S1,
        Mutant("strict causality", STRICT, must_refuse=True),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
        Mutant("heads tiled", {"heads": tile}),
    ),
    spell(
        repeat_then_where,
        Kind.S1,
        Mutant("blocks of 4", {"block": 4}),
        Mutant("blocks tiled over tokens", {"widen": widen_by_tile}, must_refuse=True),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("strict causality", STRICT, must_refuse=True),
    ),
    spell(
        bnhd_expand,
        Kind.S1,
        Mutant("fill leaks probability", {"fill": -4.0}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.lt}, must_refuse=True),
        Mutant("softmax over heads", {"axis": 1}, must_refuse=True),
        Mutant("two blocks", {"topk": 2}),
        Mutant("heads tiled", {"group_axis": 2}),
        shapes=QKV_BNHD,
    ),
    spell(
        inverse_of_a_share,
        Kind.S1,
        Mutant("odd keys count twice", {"odd": 0.5}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("no share for odd keys", {"odd": 0.0}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        softmax_by_hand,
        Kind.S1,
        Mutant("sums over queries", {"axis": -2}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
        Mutant("strict causality", STRICT, must_refuse=True),
    ),
    spell(
        one_hot_sum,
        Kind.S1,
        Mutant("blocks of 4", {"block": 4}),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("own position hidden", {"sees": operator.ge}, must_refuse=True),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
    ),
    spell(
        index_put,
        Kind.S1,
        Mutant("tokens one off", {"offset": 1}),
        Mutant("anticausal", {"sees": operator.le}, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
    ),
    spell(
        equality_any,
        Kind.S1,
        Mutant("two of three picks", {"picks": 2}),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        Mutant("value heads swapped", {"values": swapped}),
        Mutant("tokens in blocks of 4", {"per_block": 4}),
    ),
    spell(
        per_query_head,
        Kind.S1,
        Mutant("one block", {"topk": 1}),
        Mutant("blocks of the next query", {"order": rolled}),
        Mutant("strict causality", STRICT, must_refuse=True),
    ),
)
