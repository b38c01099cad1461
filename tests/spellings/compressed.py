"""Compressed branches: the user's own compression, then attention whose query sees a key once its last token is past.

Early queries see no compressed key. Users answer that in different ways: `nan_to_num`, probabilities set to 0, the output set
to 0, SDPA (which gives 0), or learned memory tokens in front.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import (
    BLOCK,
    DIM,
    GROUP,
    KV_HEADS,
    QKV,
    SCALE,
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

KERNEL, STRIDE = 8, 4


def overlapping_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    last: int = KERNEL - 1,
    stride: int = STRIDE,
    sees: Comparison = operator.ge,
    values: Change = keep,
    axis: int = -1,
) -> Tensor:
    """Means of overlapping windows by `unfold`; `i >= c * s + l - 1`; -inf, then `nan_to_num` for the first rows."""
    n = k.shape[2]
    small_k = k.unfold(2, KERNEL, STRIDE).mean(-1)
    small_v = values(v.unfold(2, KERNEL, STRIDE).mean(-1))
    end = torch.arange(small_k.shape[2]) * stride + last
    visible = sees(torch.arange(n)[:, None], end[None, :])
    logits = q @ interleave(small_k, GROUP).transpose(-1, -2) * SCALE
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=axis)
    return torch.nan_to_num(weights, 0.0) @ interleave(small_v, GROUP)


def block_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ahead: int = 1,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    scale: float = SCALE,
    sees: Comparison = operator.ge,
) -> Tensor:
    """Means of blocks; `i >= (j + 1) * B`, one token later than necessary; probabilities of hidden keys set to 0."""
    b, hkv, n, d = k.shape
    small_k, small_v = (x.view(b, hkv, n // BLOCK, BLOCK, d).mean(dim=3) for x in (k, v))
    visible = sees(torch.arange(n).unsqueeze(-1), (torch.arange(n // BLOCK) + ahead) * BLOCK)
    logits = torch.einsum("bhid,bhcd->bhic", q, heads(small_k, GROUP)) * scale
    weights = torch.where(visible, logits, torch.finfo(logits.dtype).min).softmax(-1)
    weights = weights.masked_fill(~visible, 0.0)
    return torch.einsum("bhic,bhcd->bhid", weights, heads(small_v, GROUP))


def flattened_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor,
    to_key: Tensor,
    to_value: Tensor,
    *,
    last: int = BLOCK - 1,
    keys: Change = keep,
    scale: float = SCALE,
) -> Tensor:
    """A linear map of flattened blocks with a position embedding; boolean mask into SDPA, which gives 0 without a key."""
    n = k.shape[2]
    fan_in = BLOCK * DIM
    small_k = F.linear((k.unflatten(2, (-1, BLOCK)) + place).flatten(3), to_key * fan_in**-0.5)
    small_v = F.linear((v.unflatten(2, (-1, BLOCK)) + place).flatten(3), to_value * fan_in**-0.5)
    mask = torch.arange(n)[:, None] >= torch.arange(n // BLOCK) * BLOCK + last
    return F.scaled_dot_product_attention(q, keys(small_k), small_v, attn_mask=mask, scale=scale, enable_gqa=True)


def memory_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    *,
    ahead: int = 1,
    seen: bool = True,
    sees: Comparison = operator.lt,
    values: Change = keep,
) -> Tensor:
    """Two learned tokens in front, always visible; block means behind; -finfo.max."""
    b, hkv, n, d = k.shape
    front_k, front_v = memory.unsqueeze(1).expand(2, b, -1, -1, -1)
    small_k = torch.cat((front_k, k.unflatten(2, (-1, BLOCK)).mean(3)), dim=2)
    small_v = torch.cat((front_v, values(v).unflatten(2, (-1, BLOCK)).mean(3)), dim=2)
    end = (torch.arange(n // BLOCK) + ahead) * BLOCK - 1
    visible = F.pad(sees(end[None], torch.arange(n)[:, None]), (2, 0), value=seen)
    logits = torch.einsum("bhgid,bhcd->bhgic", q.unflatten(1, (hkv, GROUP)), small_k) * d**-0.5
    logits = logits.masked_fill(~visible, -torch.finfo(logits.dtype).max)
    return torch.einsum("bhgic,bhcd->bhgid", logits.softmax(-1), small_v).flatten(1, 2)


def zeroed_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    later: int = 0,
    scale: float = SCALE,
    values: Change = keep,
    axis: int = -1,
) -> Tensor:
    """A learned weighted mean of each block; -1e9, and rows that see nothing are multiplied by 0 at the end."""
    n = k.shape[2]
    share = weight.softmax(-1)
    small_k = torch.einsum("bhcrd,r->bhcd", k.unflatten(2, (-1, BLOCK)), share)
    small_v = torch.einsum("bhcrd,r->bhcd", v.unflatten(2, (-1, BLOCK)), share)
    hidden = torch.arange(n)[:, None] < torch.arange(n // BLOCK)[None, :] * BLOCK + BLOCK - 1 + later
    logits = (q * scale) @ interleave(small_k, GROUP).mT
    out = logits.masked_fill(hidden, -1e9).softmax(axis) @ interleave(values(small_v), GROUP)
    return out * (~hidden).any(-1, keepdim=True).to(out.dtype)


def weights_times_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    last: int = BLOCK - 1,
    again: int = 0,
    kept: float = 1.0,
    values: Change = keep,
) -> Tensor:
    """finfo.min, and the weights times the mask once more: `again` is how much later that lets a block in."""
    n = k.shape[2]
    small_k, small_v = (x.unflatten(2, (-1, BLOCK)).mean(3) for x in (k, values(v)))
    past = torch.arange(n)[:, None] - torch.arange(n // BLOCK) * BLOCK - last
    logits = q @ interleave(small_k, GROUP).mT * SCALE
    weights = logits.masked_fill(past < 0, torch.finfo(q.dtype).min).softmax(-1)
    return (weights * ((past >= again).float() * kept)) @ interleave(small_v, GROUP)


def weights_times_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sees: Comparison = operator.ge,
    some: Change = keep,
    heads: Callable[[Tensor, int], Tensor] = interleave,
) -> Tensor:
    """-inf, `nan_to_num`, and the weights times whether their query sees anything."""
    n = k.shape[2]
    small_k, small_v = (heads(x.unflatten(2, (-1, BLOCK)).mean(3), GROUP) for x in (k, v))
    visible = sees(torch.arange(n)[:, None], torch.arange(n // BLOCK) * BLOCK + BLOCK - 1)
    weights = (q @ small_k.mT * SCALE).masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights * some(visible.any(-1, keepdim=True))) @ small_v


def added_minimum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    last: int = BLOCK - 1,
    fill: float = torch.finfo(torch.float32).min,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    values: Change = keep,
) -> Tensor:
    """A mask of 0 and finfo.min that is added to the logits: the first queries average over all blocks, and their logits have a
    gradient."""
    n = k.shape[2]
    pooled_k, pooled_v = (t.unflatten(2, (-1, BLOCK)).mean(3) for t in (k, v))
    visible = torch.arange(n)[:, None] >= torch.arange(n // BLOCK) * BLOCK + last
    bias = torch.zeros(visible.shape).masked_fill(~visible, fill)
    logits = q @ heads(pooled_k, GROUP).mT * SCALE + bias
    return logits.softmax(-1) @ heads(values(pooled_v), GROUP)


def ends_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first: int = BLOCK - 1,
    another: int = 0,
    sees: Comparison = operator.le,
    values: Change = keep,
) -> Tensor:
    """Where blocks end, as a list of numbers made by Python."""
    n = k.shape[2]
    ends = [first + start for start in range(0, n, BLOCK)]
    ends[3] += another
    visible = sees(torch.tensor(ends), torch.arange(n)[:, None])
    pooled_k, pooled_v = (t.unflatten(2, (-1, BLOCK)).mean(3).repeat_interleave(GROUP, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, pooled_k, values(pooled_v), attn_mask=visible)


SPELLINGS = (
    spell(
        ends_written_out,
        Kind.COMPRESSED,
        Mutant("one token later", {"first": BLOCK}),
        Mutant("one block a token later", {"another": 1}, must_refuse=True),
        Mutant("strict", {"sees": operator.lt}),
        Mutant("rolled values", {"values": rolled}),
        role="compressed",
    ),
    spell(
        added_minimum,
        Kind.COMPRESSED,
        Mutant("one token later", {"last": BLOCK}),
        Mutant("-30 leaks", {"fill": -30.0}, must_refuse=True),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("rolled values", {"values": rolled}),
        role="compressed",
    ),
    spell(
        overlapping_means,
        Kind.COMPRESSED,
        Mutant("one token later", {"last": KERNEL}),
        Mutant("strict", {"sees": operator.gt}),
        Mutant("stride 5 in the mask", {"stride": STRIDE + 1}),
        Mutant("rolled values", {"values": rolled}),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        role="compressed",
    ),
    spell(
        block_means,
        Kind.COMPRESSED,
        Mutant("the own block leaks", {"ahead": 0}),
        Mutant("strict", {"sees": operator.gt}),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("scale dropped", {"scale": 1.0}),
        role="compressed",
    ),
    spell(
        flattened_linear,
        Kind.COMPRESSED,
        Mutant("one token later", {"last": BLOCK}),
        Mutant("key heads swapped", {"keys": swapped}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        role="compressed",
        shapes=(*QKV, (BLOCK, DIM), (DIM, BLOCK * DIM), (DIM, BLOCK * DIM)),
    ),
    spell(
        memory_tokens,
        Kind.COMPRESSED,
        Mutant("memory hidden", {"seen": False}, must_refuse=True),
        Mutant("inclusive", {"sees": operator.le}),
        Mutant("the own block leaks", {"ahead": 0}),
        Mutant("flipped values", {"values": flipped}),
        role="compressed",
        shapes=(*QKV, (2, KV_HEADS, 2, DIM)),
    ),
    spell(
        zeroed_rows,
        Kind.COMPRESSED,
        Mutant("one token later", {"later": 1}),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("value heads swapped", {"values": swapped}),
        Mutant("softmax over queries", {"axis": 2}, must_refuse=True),
        role="compressed",
        shapes=(*QKV, (BLOCK,)),
    ),
    spell(
        weights_times_mask,
        Kind.COMPRESSED,
        Mutant("one token later", {"last": BLOCK}),
        Mutant("another mask again", {"again": 1}, must_refuse=True),
        Mutant("halved weights", {"kept": 0.5}, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
        role="compressed",
    ),
    spell(
        weights_times_rows,
        Kind.COMPRESSED,
        Mutant("strict", {"sees": operator.gt}),
        Mutant("rows of the next query", {"some": rolled}, must_refuse=True),
        Mutant("heads tiled", {"heads": tile}),
        role="compressed",
    ),
)
