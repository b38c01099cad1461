"""Sliding windows: bands over N x N, chunks that look back, and unfolded keys."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spelling import (
    BATCH,
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    QKV,
    QKV_BNHD,
    SCALE,
    Kind,
    Mutant,
    Spelling,
    flipped,
    from_module,
    interleave,
    keep,
    rolled,
    spell,
    swapped,
    tile,
)

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]

WINDOW = 16
RAGGED = ((BATCH, HEADS, 100, DIM), (BATCH, KV_HEADS, 100, DIM), (BATCH, KV_HEADS, 100, DIM))
"""A length that is not a multiple of the window."""


def band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = WINDOW,
    near: Callable[[Tensor, int], Tensor] = operator.lt,
    sees: Comparison = operator.ge,
    axis: int = -1,
) -> Tensor:
    """`(j <= i) & (i - j < W)`, -inf."""
    n = k.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    visible = sees(i, j) & near(i - j, window)
    logits = (q @ interleave(k, GROUP).transpose(-2, -1)) * q.shape[-1] ** -0.5
    return logits.masked_fill(~visible, float("-inf")).softmax(dim=axis) @ interleave(v, GROUP)


def split_by_interleave(q: Tensor) -> Tensor:
    """(b, n, hq, d) to (b, n, hkv, g, d): query head h in group h // g."""
    return q.unflatten(2, (KV_HEADS, GROUP))


def split_by_tile(q: Tensor) -> Tensor:
    """(b, n, hq, d) to (b, n, hkv, g, d): query head h in group h % hkv."""
    return q.unflatten(2, (GROUP, KV_HEADS)).transpose(2, 3)


def inclusive_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    near: Callable[[Tensor, int], Tensor] = operator.le,
    distance: Change = keep,
    grouped: Change = split_by_interleave,
    scale: float = SCALE,
) -> Tensor:
    """`0 <= i - j <= W` (a window of W + 1), `finfo.min`, grouped einsum in BNHD."""
    n = k.shape[1]
    apart = distance(torch.arange(n).unsqueeze(1) - torch.arange(n).unsqueeze(0))
    hidden = (apart < 0) | ~near(apart, WINDOW)
    logits = torch.einsum("bihgd,bjhd->bhgij", grouped(q), k) * scale
    logits.masked_fill_(hidden, torch.finfo(logits.dtype).min)
    return torch.einsum("bhgij,bjhd->bihgd", logits.softmax(-1), v).flatten(2, 3)


def additive_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    diagonal: int = -WINDOW,
    upper: int = 1,
    values: Change = keep,
) -> Tensor:
    """Two triangles of -inf, added."""
    n = k.shape[2]
    corner = torch.full((n, n), float("-inf"))
    bias = corner.triu(upper) + corner.tril(diagonal)
    logits = torch.einsum("bhid,bhjd->bhij", q, interleave(k, GROUP)) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", F.softmax(logits + bias, -1), interleave(values(v), GROUP))


def triangles_into_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    diagonal: int = 1 - WINDOW,
    lower: int = 0,
    keys: Change = keep,
    scale: float | None = None,
) -> Tensor:
    """`tril & triu` into SDPA with `enable_gqa`."""
    n = k.shape[2]
    everything = torch.ones(n, n, dtype=torch.bool)
    mask = everything.tril(lower) & everything.triu(diagonal)
    return F.scaled_dot_product_attention(q, keys(k), v, attn_mask=mask, scale=scale, enable_gqa=True)


def chunk_and_look_back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = WINDOW,
    near: Callable[[Tensor, int], Tensor] = operator.le,
    sees: Comparison = operator.ge,
    values: Change = keep,
) -> Tensor:
    """Chunks of W queries against their own and the previous chunk; padded to a multiple of the chunk, masked by position."""
    n = q.shape[2]
    k, v = interleave(k, GROUP), interleave(v, GROUP)
    right = -n % WINDOW
    position = F.pad(torch.arange(n), (0, right), value=-1).view(-1, WINDOW)
    q, k, v = (F.pad(x, (0, 0, 0, right)).unflatten(2, (-1, WINDOW)) for x in (q, k, v))
    look_back = partial(F.pad, pad=(0, 0, 0, 0, 1, 0))
    keys = torch.cat((look_back(k)[:, :, :-1], k), dim=3)
    vals = values(torch.cat((look_back(v)[:, :, :-1], v), dim=3))
    key_position = torch.cat((F.pad(position, (0, 0, 1, 0), value=-1)[:-1], position), dim=1)
    i, j = position[:, :, None], key_position[:, None, :]
    visible = sees(i, j) & near(i - j, window) & (j != -1)
    logits = torch.einsum("bhcid,bhcjd->bhcij", q, keys) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~visible, -torch.finfo(logits.dtype).max)
    return torch.einsum("bhcij,bhcjd->bhcid", logits.softmax(-1), vals).flatten(2, 3)[:, :, :n]


def halves_of_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: int = 1,
    triangle: int = 1,
    heads: Callable[[Tensor, int], Tensor] = interleave,
) -> Tensor:
    """Previous chunk by slicing and `cat` with zeros; the mask by its shape: an upper and a lower triangle."""
    b, h, n, d = q.shape
    k, v = heads(k, GROUP), heads(v, GROUP)
    q, k, v = (x.reshape(b, h, n // WINDOW, WINDOW, d) for x in (q, k, v))
    keys = torch.cat((torch.cat((torch.zeros_like(k[:, :, :step]), k[:, :, :-step]), dim=2), k), dim=3)
    vals = torch.cat((torch.cat((torch.zeros_like(v[:, :, :step]), v[:, :, :-step]), dim=2), v), dim=3)
    ones = torch.ones(WINDOW, WINDOW, dtype=torch.bool)
    visible = torch.cat((ones.triu(triangle), ones.tril()), dim=1).repeat(n // WINDOW, 1, 1)
    visible[:step, :, :WINDOW] = False
    weights = (q @ keys.mT / d**0.5).masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ vals).view(b, h, n, d)


def unfolded_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = WINDOW,
    values: Change = keep,
    scale: float = SCALE,
    axis: int = -1,
) -> Tensor:
    """`pad -> unfold(W)` gives each query its own keys; the padding is masked."""
    n = k.shape[2]
    k, v = interleave(k, GROUP), interleave(values(v), GROUP)
    keys = F.pad(k, (0, 0, window - 1, 0)).unfold(2, window, 1)
    vals = F.pad(v, (0, 0, window - 1, 0)).unfold(2, window, 1)
    position = torch.arange(n)[:, None] - (window - 1) + torch.arange(window)
    logits = torch.einsum("bhid,bhidw->bhiw", q, keys) * scale
    logits = logits.masked_fill(position < 0, float("-inf"))
    return torch.einsum("bhiw,bhidw->bhid", logits.softmax(axis), vals)


def shifted_slices(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = WINDOW, step: int = 1, first: int = 0, values: Change = keep
) -> Tensor:
    """Key and value of each distance, by slices of the padded tensors that are stacked."""
    n = k.shape[2]
    k, v = interleave(k, GROUP), interleave(values(v), GROUP)
    keys, vals = (torch.stack([F.pad(x, (0, 0, back * step, 0))[:, :, :n] for back in range(window)], 3) for x in (k, v))
    position = torch.arange(n)[:, None] - torch.arange(first, first + window)
    logits = torch.einsum("bhid,bhiwd->bhiw", q, keys) * SCALE
    return torch.einsum("bhiw,bhiwd->bhid", logits.masked_fill(position < 0, float("-inf")).softmax(-1), vals)


def slices_side_by_side(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = WINDOW, odd: int = 0, heads: Callable[[Tensor, int], Tensor] = interleave
) -> Tensor:
    """Padded once; the slices from the farthest to the nearest are joined by `cat`. `odd` moves one of the values' slices."""
    n = k.shape[2]
    k, v = (F.pad(heads(x, GROUP), (0, 0, window - 1, 0)) for x in (k, v))
    starts = [start + odd * (start == 3) for start in range(window)]
    keys = torch.cat([k[:, :, start : start + n, None] for start in range(window)], 3)
    vals = torch.cat([v[:, :, start : start + n, None] for start in starts], 3)
    hidden = torch.arange(n)[:, None] + torch.arange(window) < window - 1
    logits = (q[:, :, :, None] * SCALE @ keys.mT).squeeze(3).masked_fill(hidden, float("-inf"))
    return (logits.softmax(-1)[:, :, :, None] @ vals).squeeze(3)


class ChunkedQueries(nn.Module):
    """The queries are normed and scaled in chunks of 8, each of which sees itself and the two before it."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))
        self.window: int = changes.get("window", WINDOW)
        self.chunk: Change = changes.get("chunk", keep)
        self.back: tuple[int, ...] = changes.get("back", (2, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, size = q.shape[2], 8
        k, v = (interleave(x, GROUP).unflatten(2, (-1, size)) for x in (k, v))
        q = F.rms_norm(self.chunk(q.unflatten(2, (-1, size))), (DIM,), self.scale)
        keys, vals = (torch.cat([*(F.pad(x, (0, 0, 0, 0, back, -back)) for back in self.back), x], 3) for x in (k, v))
        place = torch.arange(n).view(-1, size)
        key = place[:, :1] - 2 * size + torch.arange(3 * size)
        distance = place[..., None] - key[:, None]
        visible = (distance >= 0) & (distance < self.window) & (key >= 0)[:, None]
        logits = (q @ keys.mT * SCALE).masked_fill(~visible, float("-inf"))
        return (logits.softmax(-1) @ vals).flatten(2, 3)


def next_chunk(x: Tensor) -> Tensor:
    """(b, h, chunks, size, d) with its chunks moved by one."""
    return x.roll(1, 2)


SPELLINGS = (
    spell(
        band,
        Kind.WINDOW,
        Mutant("window 15", {"window": WINDOW - 1}),
        Mutant("inclusive", {"near": operator.le}),
        Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
        Mutant("softmax over queries", {"axis": 2}, must_refuse=True),
        role="sliding_window",
    ),
    spell(
        inclusive_band,
        Kind.WINDOW,
        Mutant("exclusive", {"near": operator.lt}),
        Mutant("looks ahead", {"distance": operator.neg}, must_refuse=True),
        Mutant("queries grouped by tile", {"grouped": split_by_tile}),
        Mutant("scale dropped", {"scale": 1.0}),
        role="sliding_window",
        shapes=QKV_BNHD,
    ),
    spell(
        additive_band,
        Kind.WINDOW,
        Mutant("window 17", {"diagonal": -WINDOW - 1}),
        Mutant("own position hidden", {"upper": 0}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
        role="sliding_window",
    ),
    spell(
        triangles_into_sdpa,
        Kind.WINDOW,
        Mutant("window 17", {"diagonal": -WINDOW}),
        Mutant("sees one future position", {"lower": 1}),
        Mutant("key heads swapped", {"keys": swapped}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        role="sliding_window",
    ),
    spell(
        chunk_and_look_back,
        Kind.WINDOW,
        Mutant("window 15", {"window": WINDOW - 1}),
        Mutant("exclusive", {"near": operator.lt}),
        Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
        Mutant("values rolled in their chunks", {"values": rolled}, must_refuse=True),
        role="sliding_window",
        shapes=RAGGED,
    ),
    spell(
        halves_of_chunks,
        Kind.WINDOW,
        Mutant("looks back two chunks", {"step": 2}, must_refuse=True),
        Mutant("window one wider", {"triangle": 0}),
        Mutant("heads tiled", {"heads": tile}),
        role="sliding_window",
    ),
    spell(
        unfolded_keys,
        Kind.WINDOW,
        Mutant("window 15", {"window": WINDOW - 1}),
        Mutant("rolled values", {"values": rolled}),
        Mutant("scale dropped", {"scale": 1.0}),
        Mutant("softmax over queries", {"axis": 2}, must_refuse=True),
        role="sliding_window",
    ),
    spell(
        shifted_slices,
        Kind.WINDOW,
        Mutant("window 15", {"window": WINDOW - 1}),
        Mutant("every other key", {"step": 2}, must_refuse=True),
        Mutant("padding is seen", {"first": -1}, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
        role="sliding_window",
    ),
    spell(
        slices_side_by_side,
        Kind.WINDOW,
        Mutant("window 17", {"window": WINDOW + 1}),
        Mutant("one slice of the values is another", {"odd": 1}, must_refuse=True),
        Mutant("heads tiled", {"heads": tile}),
        role="sliding_window",
    ),
    Spelling(
        "chunked_queries",
        Kind.WINDOW,
        from_module(ChunkedQueries, QKV),
        ("sliding_window",),
        (
            Mutant("window 15", {"window": WINDOW - 1}),
            Mutant("queries of the next chunk", {"chunk": next_chunk}),
            Mutant("chunks in another order", {"back": (1, 2)}, must_refuse=True),
        ),
    ),
)
