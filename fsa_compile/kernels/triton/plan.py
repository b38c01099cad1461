"""The plan of selected attention: from index lists to work items, on the device, without a host synchronisation.

A *lane* is one (batch row, index head); an *entry* is one (query, slot) of its index list that names an existing block
with a visible key for the first time in its row. Queries are cut into *slices*, so that what a kernel keeps per entry
stays bounded; a *segment* is one slice of one lane.

A block that many neighbouring queries list is *dense* in their tile: the own block always (causal masks are then needed there
alone), any other from `least` queries on. Tiles keep the dense blocks in a list, for a query-outer loop; they are no entries.

1. `_count_kernel` sorts the slots of a tile of queries by block, drops absent, invisible and repeated ones, lists the dense
   blocks, and counts a segment's entries per block, with one atomic per tile and block; the counter's old value gives the
   entries their rank within the block.
2. `_layout_kernel` turns the counts of a segment into offsets (a prefix sum over blocks).
3. `_fill_kernel` writes the entries ordered by block; a stable sort takes its place where the order inside a block must
   be the same in every run (ranks come from atomics). Other programs of it cut each block's entries into work items of at
   most `item_queries` entries.

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
from .launcher import run

TILE_SLOTS = 512
"""Slots that one program of the plan sorts, where no dense blocks are looked for and one query has no more."""
DENSE_SHARE = 3 / 8
"""Share of a tile's queries from which a block is dense in it."""


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
class DenseBlocks:
    """The dense blocks of each tile of queries, on the device.

    Args:
        count: (lanes, tiles) int32 number of dense blocks.
        block: (lanes, tiles, capacity) int32 their block numbers, ascending.
        members: (lanes, tiles, capacity) int32, int64 for more than 32 queries; bit i: the tile's query i lists the block.
        queries: Queries of a tile, at most 64.
    """

    count: torch.Tensor
    block: torch.Tensor
    members: torch.Tensor
    queries: int


@dataclass(frozen=True)
class Plan:
    """Entries and work items of `lanes` index lists, all on the device, int32.

    Args:
        kept: (lanes, slices * slice_length, t) block of each slot, -1 for a slot that is no entry.
        order: (lanes, slices, slice_length * t) entries of a segment ordered by block, as ``local query * t + slot``.
        starts: (lanes, slices, blocks + 1) first entry of each block in `order`.
        item_starts: (lanes, slices, blocks + 1) first work item of each block; the last is the number of items.
        item_block: (lanes, slices, capacity) block of each work item.
        item_first: (lanes, slices, capacity) its first entry in `order`.
        item_length: (lanes, slices, capacity) its number of entries.
        lanes: The planned part of the ``b * hi`` lanes; lane ``batch * hi + head``.
        slice_length: Queries of a slice.
        slices: Number of slices.
        blocks: Number of blocks.
        capacity: Upper bound of a segment's work items.
        dense: What the entries leave out, or None if nothing.
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
    dense: DenseBlocks | None


@triton.jit
def _add_equal(key_a, count_a, key_b, count_b):
    return key_b, count_b + tl.where(key_a == key_b, count_a, 0)


@triton.jit
def _add_equal_and_bits(block_a, weight_a, bits_a, block_b, weight_b, bits_b):
    same = block_a == block_b
    return block_b, weight_b + tl.where(same, weight_a, 0), bits_b + tl.where(same, bits_a, 0)


@triton.jit(do_not_specialize=["n", "n_blocks", "offset", "first_lane", "slice_length", "n_slices", "least"])
def _count_kernel(
    indices, offsets, kept, rank, counts, dense_count, dense_block, dense_members,
    stride_b, stride_h, stride_n, stride_t, block_size, n_index_heads,
    n, n_blocks, offset, first_lane, slice_length, n_slices, least,
    T: tl.constexpr, T_PAD: tl.constexpr, QUERIES: tl.constexpr, CAPACITY: tl.constexpr,
    RULE: tl.constexpr, HAS_OFFSETS: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = QUERIES * T_PAD
    padded = slice_length * n_slices
    tiles = tl.cdiv(padded, QUERIES)
    lane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = ((first_lane + lane) // n_index_heads).to(tl.int64)
    head = ((first_lane + lane) % n_index_heads).to(tl.int64)
    if HAS_OFFSETS:
        shift = tl.load(offsets + batch).to(tl.int64)
    else:
        shift = tl.zeros((), tl.int64) + offset
    at = tl.arange(0, SIZE)
    row = tile * QUERIES + at // T_PAD
    slot = at % T_PAD
    line = indices + batch * stride_b + head * stride_h + row.to(tl.int64) * stride_n
    block = tl.load(line + slot.to(tl.int64) * stride_t, mask=(row < n) & (slot < T), other=-1)
    entry = (block >= 0) & (block < n_blocks)
    if RULE == "causal":
        entry = entry & (block.to(tl.int64) * block_size <= row + shift)
    key = tl.where(entry, block, n_blocks)
    if WIDE:
        key = tl.sort(key.to(tl.int64) * SIZE + at)
    else:
        key = tl.sort(key.to(tl.int32) * SIZE + at)
    at = (key % SIZE).to(tl.int32)
    block = (key // SIZE).to(tl.int32)
    row = tile * QUERIES + at // T_PAD
    # Repetitions of a block in one row are neighbours now.
    _, repetition = tl.associative_scan((key // T_PAD, tl.full((SIZE,), 1, tl.int32)), 0, _add_equal)
    entry = (block < n_blocks) & (repetition == 1)
    weight = entry.to(tl.int32)
    if DENSE:
        if RULE != "listed":
            first_key = block.to(tl.int64) * block_size
            own = (row + shift >= first_key) & (row + shift < first_key + block_size)
            weight = tl.where(entry & own, SIZE, weight)  # dense, however few list it
        word: tl.constexpr = dense_members.dtype.element_ty
        bits = entry.to(word) << (at // T_PAD).to(word)
        _, so_far = tl.associative_scan((block, weight), 0, _add_equal)
        _, to_come, members = tl.associative_scan((block, weight, bits), 0, _add_equal_and_bits, reverse=True)
        dense = so_far + to_come - weight >= least
        first = entry & dense & (so_far == weight)
        number = tl.cumsum(first.to(tl.int32), 0) - 1
        target = (lane * tiles + tile).to(tl.int64) * CAPACITY + number
        tl.store(dense_block + target, block, mask=first)
        tl.store(dense_members + target, members, mask=first)
        tl.store(dense_count + lane * tiles + tile, tl.sum(first.to(tl.int32), 0))
        entry = entry & ~dense
    else:
        _, so_far = tl.associative_scan((block, weight), 0, _add_equal)
        _, to_come = tl.associative_scan((block, weight), 0, _add_equal, reverse=True)
    # A tile lies in one slice. The first entry of a block counts for all of the tile.
    segment = lane.to(tl.int64) * n_slices + (tile * QUERIES) // slice_length
    first = entry & (so_far == 1)
    before = tl.atomic_add(counts + segment * n_blocks + block, to_come, mask=first, sem="relaxed")
    _, before = tl.associative_scan((block, tl.where(first, before, 0)), 0, _add_equal)
    target = (lane.to(tl.int64) * padded + row) * T + at % T_PAD
    written = (row < padded) & (at % T_PAD < T)
    tl.store(kept + target, tl.where(entry, block, -1), mask=written)
    tl.store(rank + target, before + so_far - 1, mask=written & entry)


@triton.jit(do_not_specialize=["n_blocks"])
def _layout_kernel(counts, starts, item_starts, n_blocks, ITEM: tl.constexpr, TILE: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    entries = tl.zeros((), tl.int32)
    items = tl.zeros((), tl.int32)
    target = segment * (n_blocks + 1)  # a segment has one more start than blocks: the end of the last
    for first in range(0, n_blocks, TILE):
        block = first + tl.arange(0, TILE)
        count = tl.load(counts + segment * n_blocks + block, mask=block < n_blocks, other=0)
        pieces = (count + ITEM - 1) // ITEM
        tl.store(starts + target + block, entries + tl.cumsum(count, 0) - count, mask=block < n_blocks)
        tl.store(item_starts + target + block, items + tl.cumsum(pieces, 0) - pieces, mask=block < n_blocks)
        entries += tl.sum(count, 0)
        items += tl.sum(pieces, 0)
    tl.store(starts + target + n_blocks, entries)
    tl.store(item_starts + target + n_blocks, items)


@triton.jit
def _order_entries(
    kept, rank, starts, order, segment, tile, n_blocks, slice_length,
    T: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    segment_size = slice_length * T
    pair = tile * SIZE + tl.arange(0, SIZE)
    source = segment * segment_size + pair
    block = tl.load(kept + source, mask=pair < segment_size, other=-1)
    entry = block >= 0
    start = tl.load(starts + segment * (n_blocks + 1) + block, mask=entry, other=0)
    before = tl.load(rank + source, mask=entry, other=0)
    tl.store(order + segment * segment_size + start + before, pair, mask=entry)


@triton.jit
def _cut_items(
    starts, item_starts, item_block, item_first, item_length, segment, tile, n_blocks, capacity,
    ITEM: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block = tile * TILE + tl.arange(0, TILE)
    inside = block < n_blocks
    at = segment * (n_blocks + 1) + block
    start = tl.load(starts + at, mask=inside, other=0)
    stop = tl.load(starts + at + 1, mask=inside, other=0)
    first = tl.load(item_starts + at, mask=inside, other=0)
    pieces = (stop - start + ITEM - 1) // ITEM
    even = tl.cdiv(tl.cdiv(stop - start, tl.maximum(pieces, 1)), UNIT) * UNIT
    for piece in range(tl.max(pieces, 0)):
        begin = start + piece * even
        target = segment * capacity + first + piece
        tl.store(item_block + target, block, mask=begin < stop)
        tl.store(item_first + target, begin, mask=begin < stop)
        tl.store(item_length + target, tl.minimum(stop - begin, even), mask=begin < stop)


@triton.jit(do_not_specialize=["n_blocks", "slice_length", "capacity", "fill_tiles"])
def _fill_kernel(
    kept, rank, starts, order, item_starts, item_block, item_first, item_length, n_blocks, slice_length, capacity,
    fill_tiles, T: tl.constexpr, SIZE: tl.constexpr, ITEM: tl.constexpr,
    UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = fill_tiles + tl.cdiv(n_blocks, TILE)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tile < fill_tiles:
        _order_entries(kept, rank, starts, order, segment, tile, n_blocks, slice_length, T, SIZE)
    else:
        _cut_items(
            starts, item_starts, item_block, item_first, item_length, segment, tile - fill_tiles, n_blocks, capacity,
            ITEM, UNIT, TILE,
        )  # fmt: skip


def build_plan(
    indices: torch.Tensor,
    lanes: range,
    n_keys: int,
    block_size: int,
    rule: str,
    positions: Positions,
    slice_length: int,
    item_queries: int,
    tile_queries: int = 1,
    stable: bool = False,
    dense_queries: int = 0,
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
        item_queries: Most entries of a work item, a multiple of `tile_queries`.
        tile_queries: A block's work items are even up to so many entries.
        stable: Order the entries of a block by query, the same in every run.
        dense_queries: Queries of a tile of `DenseBlocks` at most, a power of two; 0 for a plan in which everything is an entry.

    Returns:
        The plan; nothing of it was read on the host.
    """
    _, hi, n, t = indices.shape
    count, slices, blocks = len(lanes), -(-n // slice_length), -(-n_keys // block_size)
    capacity = slice_length * t // item_queries + blocks

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=indices.device)

    kept, rank = ints(count, slices * slice_length, t), ints(count, slices * slice_length, t)
    counts = torch.zeros((count, slices, blocks), dtype=torch.int32, device=indices.device)
    t_pad = power_of_two(t)
    queries = dense_queries or min(max(1, TILE_SLOTS // t_pad), power_of_two(n))
    while slices > 1 and slice_length % queries:
        queries //= 2
    tiles, least = -(-slices * slice_length // queries), max(1, int(queries * DENSE_SHARE))
    dense, most = None, 1
    if dense_queries:
        # Own blocks are at most one more than a tile's queries can lie in.
        most = queries * t // least + min(queries, -(-queries // block_size) + 1)
        word = torch.int64 if queries > 32 else torch.int32
        dense = DenseBlocks(ints(count, tiles), ints(count, tiles, most), ints(count, tiles, most, dtype=word), queries)
    offsets = positions.offsets
    listed = (dense.count, dense.block, dense.members) if dense else (counts, counts, counts)
    run(
        _count_kernel, count * tiles,
        (indices, counts if offsets is None else offsets, kept, rank, counts, *listed),
        (*indices.stride(), block_size, hi),
        (n, blocks, positions.offset, lanes.start, slice_length, slices, least),
        dict(T=t, T_PAD=t_pad, QUERIES=queries, CAPACITY=most, RULE=rule, HAS_OFFSETS=offsets is not None,
             DENSE=dense is not None, WIDE=(blocks + 1) * queries * t_pad >= 2**31),
        num_warps=max(1, min(8, queries * t_pad // 128)),
    )  # fmt: skip
    starts, item_starts = ints(count, slices, blocks + 1), ints(count, slices, blocks + 1)
    tile = min(4096, power_of_two(blocks))
    run(
        _layout_kernel, count * slices, (counts, starts, item_starts), (), (blocks,),
        dict(ITEM=item_queries, TILE=tile),
    )  # fmt: skip
    if stable:
        key = kept.view(count, slices, slice_length * t)
        order = torch.sort(torch.where(key < 0, blocks, key), dim=-1, stable=True).indices.to(torch.int32)
    else:
        order = ints(count, slices, slice_length * t)
    item_block, item_first, item_length = (ints(count, slices, capacity) for _ in range(3))
    fill_tiles, tile = 0 if stable else -(-slice_length * t // 1024), min(32, power_of_two(blocks))
    run(
        _fill_kernel, count * slices * (fill_tiles - (-blocks // tile)),
        (kept, rank, starts, order, item_starts, item_block, item_first, item_length), (),
        (blocks, slice_length, capacity, fill_tiles),
        dict(T=t, SIZE=1024, ITEM=item_queries, UNIT=tile_queries, TILE=tile),
    )  # fmt: skip
    return Plan(
        kept, order, starts, item_starts, item_block, item_first, item_length, lanes, slice_length, slices, blocks, capacity,
        dense,
    )  # fmt: skip


def cut(lanes: range, lane_bytes: int, budget: int, multiple: int = 1) -> Iterator[range]:
    """Cut `lanes` into ranges of a multiple of `multiple` lanes, at `lane_bytes` each within `budget` where one multiple is."""
    step = max(1, budget // max(lane_bytes * multiple, 1)) * multiple
    for first in range(lanes.start, lanes.stop, step):
        yield range(first, min(first + step, lanes.stop))
