"""The visibility rule of banded attention: who sees whom, in arithmetic that the kernels evaluate, without tables.

A query at position p sees the keys

    max(0, p - window + 1) <= key < min(m, prefix + max(0, floor((p - last) / stride) + 1))

Both ends grow with p. A sliding window is ``stride = 1, last = 0, prefix = 0``; compressed attention has no window. Read the
other way round, a key is seen from the position ``(key - prefix) * stride + last`` (0 in the prefix) up to ``key + window``
exclusive, and both of these grow with the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST = 1 << 30
"""Positions, windows and strides are cut to this magnitude, so that 32 bits hold their sums; no sequence is as long."""

BAND_ARGUMENTS = ("n_queries", "n_keys", "window", "stride", "last", "prefix", "offset")
"""Arguments of every banded kernel that vary from call to call: no kernel is compiled for 1 or for multiples of 16."""


@dataclass(frozen=True)
class BandRule:
    """Which keys a query sees: the module's formula, with query i at position ``i + q_offset``.

    Args:
        window: Keys of the window, the query's own included; None for all keys from the first on.
        stride: Positions from the end of one key to the end of the next, at least 1.
        last: Position at which the first key after the prefix ends.
        prefix: Keys in front that every query sees.
        q_offset: Position of query 0, unless `q_offsets` is given.
        q_offsets: (b,) integers on the device, one position of query 0 per batch row, or None.
    """

    window: int | None = None
    stride: int = 1
    last: int = 0
    prefix: int = 0
    q_offset: int = 0
    q_offsets: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[int, ...]:
        """window, stride, last, prefix and offset as the kernels take them."""
        values = 0 if self.window is None else self.window, self.stride, self.last, self.prefix, self.q_offset
        return tuple(max(-MOST, min(MOST, x)) for x in values)


@triton.jit
def query_shift(offsets, batch, offset, HAS_OFFSETS: tl.constexpr):
    """Position of query 0 of a batch row, int32."""
    if HAS_OFFSETS:
        wide = tl.load(offsets + batch).to(tl.int64)
        shift = tl.minimum(tl.maximum(wide, -1073741824), 1073741824).to(tl.int32)
    else:
        shift = offset
    return shift


@triton.jit
def band_start(position, window, WINDOW: tl.constexpr):
    """First key that a query at `position` sees."""
    start = position * 0
    if WINDOW:
        start = tl.maximum(position - window + 1, 0)
    return start


@triton.jit
def band_stop(position, stride, last, prefix, n_keys):
    """One past the last key that a query at `position` sees; the division never sees a negative number."""
    reached = position - last
    whole = tl.where(reached >= 0, tl.maximum(reached, 0) // stride + 1, 0)
    return tl.minimum(prefix + whole, n_keys)


@triton.jit
def seen_from(key, shift, stride, last, prefix, n_queries):
    """First query (not position) that sees `key`, from 0 to n_queries."""
    first = tl.where(key < prefix, 0, (key - prefix).to(tl.int64) * stride + last - shift)
    return tl.minimum(tl.maximum(first, 0), n_queries).to(tl.int32)


@triton.jit
def seen_until(key, shift, window, n_queries, WINDOW: tl.constexpr):
    """One past the last query that sees `key`, from 0 to n_queries."""
    until = key * 0 + n_queries
    if WINDOW:
        until = tl.minimum(tl.maximum(key + window - shift, 0), n_queries)
    return until


@triton.jit
def inner_tiles(begin, end, inner_begin, inner_end, SIZE: tl.constexpr):
    """Tiles of the interval begin ... end - 1 that lie within inner_begin ... inner_end - 1, and how many others there are.

    Tiles start at `begin`, then, behind the inner ones, where these end: lo ... hi - 1 is made of whole inner tiles.
    """
    left = tl.cdiv(tl.minimum(tl.maximum(inner_begin - begin, 0), tl.maximum(end - begin, 0)), SIZE)
    lo = begin + left * SIZE
    hi = lo + tl.maximum(tl.minimum(inner_end, end) - lo, 0) // SIZE * SIZE
    return lo, hi, left + tl.cdiv(tl.maximum(end - hi, 0), SIZE)


@triton.jit
def edge_tile(begin, lo, hi, tile, SIZE: tl.constexpr):
    """First element of an edge tile: tiles from `begin` up to `lo`, then from `hi` on."""
    first = begin + tile * SIZE
    return tl.where(first < lo, first, first + hi - lo)


@triton.jit
def load_at(row, column, there, D: tl.constexpr, D_PAD: tl.constexpr, CHECKED: tl.constexpr):
    """(rows, D_PAD): what the row pointers point to; 0 where not `there` (not looked at unless CHECKED) and in padded columns."""
    at = row[:, None] + column[None, :]
    if CHECKED and D != D_PAD:
        tile = tl.load(at, mask=there[:, None] & (column < D)[None, :], other=0.0)
    elif CHECKED:
        tile = tl.load(at, mask=there[:, None], other=0.0)
    elif D != D_PAD:
        tile = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_rows(base, row, stride, column, there, D: tl.constexpr, D_PAD: tl.constexpr, CHECKED: tl.constexpr):
    """`load_at` of rows of a matrix."""
    return load_at(base + row.to(tl.int64) * stride, column, there, D, D_PAD, CHECKED)
