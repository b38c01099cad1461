"""The plan of selected attention: from index lists to work items, on the device, without a host synchronisation.

A *lane* is one (batch row, index head); an *entry* is one (query, slot) of its index list that names an existing block
with a visible key for the first time in its row. Queries are cut into *slices*, so that what a kernel keeps per entry
stays bounded; a *segment* is one slice of one lane.

1. `_count_kernel` drops absent, invisible and repeated slots, and counts a segment's entries per bin; the counter's old value
   is the entry's rank within its bin. A bin is a block and a run of queries: with one counter per block, the first block, which
   every query lists, takes one atomic per query on one address, most of the plan's time.
2. `_layout_kernel` turns the counts of a segment into offsets (a prefix sum over bins).
3. `_fill_kernel` writes the entries ordered by block; a stable sort takes its place where the order inside a block must
   be the same in every run (ranks come from atomics).
4. `_item_kernel` cuts each block's entries into work items of at most `item_queries` entries.

Sum over blocks of ceil(entries / item_queries) <= entries / item_queries + blocks: the grid is sized by that bound and
surplus programs leave at once. A block that every query lists becomes many items of the same size as any other.

Source of the KV-block-outer order: Flash Sparse Attention, arXiv 2508.18224.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import power_of_two

BIN_QUERIES = 2048
"""Queries of a slice per counter of a block, and so the most atomics on one address; but never more than 32 counters."""


@dataclass(frozen=True)
class Positions:
    """Where queries stand: query i at ``i + offset``, or at ``i + offsets[batch row]``.

    Args:
        offset: Used if `offsets` is None.
        offsets: (b,) integers on the device, or None.
    """

    offset: int
    offsets: torch.Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Entries and work items of `lanes` index lists, all on the device, int32.

    Args:
        kept: (lanes, slices * slice_length, t) block of each slot, -1 for a slot that is no entry.
        order: (lanes, slices, slice_length * t) entries of a segment ordered by block, as ``local query * t + slot``.
        starts: (lanes, slices, blocks * bins + 1) first entry of each bin in `order`.
        item_starts: (lanes, slices, blocks + 1) first work item of each block; the last is the number of items.
        item_block: (lanes, slices, capacity) block of each work item.
        item_first: (lanes, slices, capacity) its first entry in `order`.
        item_length: (lanes, slices, capacity) its number of entries.
        lanes: The planned part of the ``b * hi`` lanes; lane ``batch * hi + head``.
        slice_length: Queries of a slice.
        slices: Number of slices.
        blocks: Number of blocks.
        capacity: Upper bound of a segment's work items.
    """

    kept: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    item_starts: torch.Tensor
    item_block: torch.Tensor
    item_first: torch.Tensor
    item_length: torch.Tensor
    lanes: range
    slice_length: int
    slices: int
    blocks: int
    capacity: int


@triton.jit(do_not_specialize=["n", "n_blocks", "offset", "first_lane", "slice_length", "n_slices", "bin_length"])
def _count_kernel(
    indices, offsets, kept, rank, counts, stride_b, stride_h, stride_n, stride_t,
    n, n_blocks, block_size, offset, n_index_heads, first_lane, slice_length, n_slices, bin_length, BINS: tl.constexpr,
    T: tl.constexpr, T_PAD: tl.constexpr, ROWS: tl.constexpr, RULE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    padded = slice_length * n_slices
    tiles = tl.cdiv(padded, ROWS)
    lane = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, T_PAD)
    batch = ((first_lane + lane) // n_index_heads).to(tl.int64)
    head = ((first_lane + lane) % n_index_heads).to(tl.int64)
    line = indices + batch * stride_b + head * stride_h + row.to(tl.int64) * stride_n
    inside = (row[:, None] < n) & (slot[None, :] < T)
    block = tl.load(line[:, None] + slot.to(tl.int64)[None, :] * stride_t, mask=inside, other=-1)
    entry = (block >= 0) & (block < n_blocks)
    if RULE == "causal":
        if HAS_OFFSETS:
            position = row + tl.load(offsets + batch).to(tl.int64)
        else:
            position = row.to(tl.int64) + offset
        entry = entry & (block.to(tl.int64) * block_size <= position[:, None])
    column = line
    for earlier in range(T - 1):
        other = tl.load(column, mask=row < n, other=-1)
        column += stride_t
        entry = entry & ((slot[None, :] <= earlier) | (block != other[:, None]))
    segment = lane.to(tl.int64) * n_slices + row // slice_length
    counter = counts + (segment[:, None] * n_blocks + block) * BINS + ((row % slice_length) // bin_length)[:, None]
    before = tl.atomic_add(counter, 1, mask=entry, sem="relaxed")
    target = (lane.to(tl.int64) * padded + row)[:, None] * T + slot[None, :]
    written = (row[:, None] < padded) & (slot[None, :] < T)
    tl.store(kept + target, tl.where(entry, block, -1).to(tl.int32), mask=written)
    tl.store(rank + target, before, mask=written & entry)


@triton.jit(do_not_specialize=["n_blocks"])
def _layout_kernel(
    counts, starts, item_starts, n_blocks, ITEM: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr
):
    segment = tl.program_id(0).to(tl.int64)
    entries = tl.zeros((), tl.int32)
    items = tl.zeros((), tl.int32)
    bin = tl.arange(0, BINS)
    for first in range(0, n_blocks, TILE):
        block = first + tl.arange(0, TILE)
        at = segment * n_blocks * BINS + block[:, None] * BINS + bin[None, :]
        count = tl.load(counts + at, mask=(block < n_blocks)[:, None], other=0)
        of_block = tl.sum(count, 1)
        before = entries + tl.cumsum(of_block, 0) - of_block
        # A segment has one more start than bins, its number of entries.
        tl.store(starts + segment + at, before[:, None] + tl.cumsum(count, 1) - count, mask=(block < n_blocks)[:, None])
        pieces = (of_block + ITEM - 1) // ITEM
        first_item = items + tl.cumsum(pieces, 0) - pieces
        tl.store(item_starts + segment * (n_blocks + 1) + block, first_item, mask=block < n_blocks)
        entries += tl.sum(of_block, 0)
        items += tl.sum(pieces, 0)
    tl.store(starts + segment * (n_blocks * BINS + 1) + n_blocks * BINS, entries)
    tl.store(item_starts + segment * (n_blocks + 1) + n_blocks, items)


@triton.jit(do_not_specialize=["n_blocks", "slice_length", "bin_length"])
def _fill_kernel(
    kept, rank, starts, order, n_blocks, slice_length, bin_length, T: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr
):
    segment_size = slice_length * T
    tiles = tl.cdiv(segment_size, SIZE)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    pair = (tl.program_id(0) % tiles) * SIZE + tl.arange(0, SIZE)
    source = segment * segment_size + pair
    block = tl.load(kept + source, mask=pair < segment_size, other=-1)
    entry = block >= 0
    bin = block * BINS + (pair // T) // bin_length
    start = tl.load(starts + segment * (n_blocks * BINS + 1) + bin, mask=entry, other=0)
    before = tl.load(rank + source, mask=entry, other=0)
    tl.store(order + segment * segment_size + start + before, pair, mask=entry)


@triton.jit(do_not_specialize=["n_blocks", "capacity"])
def _item_kernel(
    starts, item_starts, item_block, item_first, item_length, n_blocks, capacity,
    ITEM: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n_blocks, TILE)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    block = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    inside = block < n_blocks
    at = segment * (n_blocks * BINS + 1) + block * BINS
    start = tl.load(starts + at, mask=inside, other=0)
    stop = tl.load(starts + at + BINS, mask=inside, other=0)
    first = tl.load(item_starts + segment * (n_blocks + 1) + block, mask=inside, other=0)
    most = tl.max((stop - start + ITEM - 1) // ITEM, 0)
    for piece in range(most):
        begin = start + piece * ITEM
        target = segment * capacity + first + piece
        tl.store(item_block + target, block, mask=begin < stop)
        tl.store(item_first + target, begin, mask=begin < stop)
        tl.store(item_length + target, tl.minimum(stop - begin, ITEM), mask=begin < stop)


def build_plan(
    indices: torch.Tensor,
    lanes: range,
    n_keys: int,
    block_size: int,
    rule: str,
    positions: Positions,
    slice_length: int,
    item_queries: int,
    stable: bool = False,
) -> Plan:
    """Work items for some lanes of `indices`.

    Args:
        indices: (b, hi, n, t) int32 or int64, any strides; n, t and n_keys positive.
        lanes: Which of the ``b * hi`` lanes.
        n_keys: Number of keys m.
        block_size: Keys of a block; the last block may be shorter.
        rule: ``"causal"``, ``"listed"`` or ``"diagonal"``.
        positions: Where queries stand.
        slice_length: Queries of a slice.
        item_queries: Most entries of a work item.
        stable: Order the entries of a block by query, the same in every run.

    Returns:
        The plan; nothing of it was read on the host.
    """
    _, hi, n, t = indices.shape
    count, slices, blocks = len(lanes), -(-n // slice_length), -(-n_keys // block_size)
    capacity = slice_length * t // item_queries + blocks
    bins = min(32, power_of_two(slice_length // BIN_QUERIES))
    bin_length = -(-slice_length // bins)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=indices.device)

    kept, rank = ints(count, slices * slice_length, t), ints(count, slices * slice_length, t)
    counts = torch.zeros((count, slices, blocks, bins), dtype=torch.int32, device=indices.device)
    t_pad = power_of_two(t)
    rows = max(1, 1024 // t_pad)
    offsets = positions.offsets
    _count_kernel[(count * -(-slices * slice_length // rows),)](
        indices, counts if offsets is None else offsets, kept, rank, counts, *indices.stride(),
        n, blocks, block_size, positions.offset, hi, lanes.start, slice_length, slices, bin_length,
        BINS=bins, T=t, T_PAD=t_pad, ROWS=rows, RULE=rule, HAS_OFFSETS=offsets is not None,
    )  # fmt: skip
    starts, item_starts = ints(count, slices, blocks * bins + 1), ints(count, slices, blocks + 1)
    tile = min(4096 // bins, 1024, power_of_two(blocks))
    _layout_kernel[(count * slices,)](counts, starts, item_starts, blocks, ITEM=item_queries, BINS=bins, TILE=tile)
    if stable:
        key = kept.view(count, slices, slice_length * t)
        order = torch.sort(torch.where(key < 0, blocks, key), dim=-1, stable=True).indices.to(torch.int32)
    else:
        order = ints(count, slices, slice_length * t)
        _fill_kernel[(count * slices * -(-slice_length * t // 1024),)](
            kept, rank, starts, order, blocks, slice_length, bin_length, T=t, BINS=bins, SIZE=1024
        )
    item_block, item_first, item_length = (ints(count, slices, capacity) for _ in range(3))
    tile = min(32, power_of_two(blocks))
    _item_kernel[(count * slices * -(-blocks // tile),)](
        starts, item_starts, item_block, item_first, item_length, blocks, capacity,
        ITEM=item_queries, BINS=bins, TILE=tile, num_warps=1,
    )  # fmt: skip
    return Plan(
        kept, order, starts, item_starts, item_block, item_first, item_length, lanes, slice_length, slices, blocks, capacity
    )


def cut(lanes: range, lane_bytes: int, budget: int, multiple: int = 1) -> Iterator[range]:
    """Cut `lanes` into ranges of a multiple of `multiple` lanes, at `lane_bytes` each within `budget` where one multiple is."""
    step = max(1, budget // max(lane_bytes * multiple, 1)) * multiple
    for first in range(lanes.start, lanes.stop, step):
        yield range(first, min(first + step, lanes.stop))
