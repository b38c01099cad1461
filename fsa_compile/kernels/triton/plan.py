"""The plan of selected attention: from index lists to work items, on the device, without a host synchronisation.

A *lane* is one (batch row, index head); an *entry* is one (query, slot) of its index list that names an existing block
with a visible key for the first time in its row. Queries are cut into *slices*, so that what a kernel keeps per entry
stays bounded; a *segment* is one slice of one lane.

1. `_count_kernel` drops absent, invisible and repeated slots, and counts a segment's entries per block; the counter's old
   value is the entry's rank within its block.
2. `_layout_kernel` turns the counts of a segment into offsets (a prefix sum over blocks).
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


@dataclass(frozen=True)
class Positions:
    """Where queries stand: query i at ``i + offset``, or at ``i + offsets[batch row]``.

    Args:
        offset: Used if `offsets` is None.
        offsets: (b,) integers on the device, or None.
    """

    offset: int
    offsets: torch.Tensor | None = None

    def batch(self, rows: slice) -> Positions:
        """The positions of some batch rows."""
        return self if self.offsets is None else Positions(self.offset, self.offsets[rows])


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
        slice_length: Queries of a slice.
        slices: Number of slices.
        capacity: Upper bound of a segment's work items.
    """

    kept: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    item_starts: torch.Tensor
    item_block: torch.Tensor
    item_first: torch.Tensor
    item_length: torch.Tensor
    slice_length: int
    slices: int
    capacity: int

    @property
    def lanes(self) -> int:
        """Number of (batch row, index head) pairs."""
        return self.kept.shape[0]


@triton.jit(do_not_specialize=["n", "n_blocks", "offset", "slice_length", "n_slices"])
def _count_kernel(
    indices, offsets, kept, rank, counts, stride_b, stride_h, stride_n, stride_t,
    n, n_blocks, block_size, offset, n_index_heads, slice_length, n_slices,
    T: tl.constexpr, T_PAD: tl.constexpr, ROWS: tl.constexpr, RULE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    padded = slice_length * n_slices
    tiles = tl.cdiv(padded, ROWS)
    lane = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, T_PAD)
    batch = (lane // n_index_heads).to(tl.int64)
    head = (lane % n_index_heads).to(tl.int64)
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
    counter = counts + segment[:, None] * n_blocks + block
    before = tl.atomic_add(counter, 1, mask=entry, sem="relaxed")
    target = (lane.to(tl.int64) * padded + row)[:, None] * T + slot[None, :]
    written = (row[:, None] < padded) & (slot[None, :] < T)
    tl.store(kept + target, tl.where(entry, block, -1).to(tl.int32), mask=written)
    tl.store(rank + target, before, mask=written & entry)


@triton.jit(do_not_specialize=["n_blocks"])
def _layout_kernel(counts, starts, item_starts, n_blocks, ITEM: tl.constexpr, TILE: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    entries = tl.zeros((), tl.int32)
    items = tl.zeros((), tl.int32)
    for first in range(0, n_blocks, TILE):
        block = first + tl.arange(0, TILE)
        inside = block < n_blocks
        count = tl.load(counts + segment * n_blocks + block, mask=inside, other=0)
        pieces = (count + ITEM - 1) // ITEM
        tl.store(starts + segment * (n_blocks + 1) + block, entries + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(item_starts + segment * (n_blocks + 1) + block, items + tl.cumsum(pieces, 0) - pieces, mask=inside)
        entries += tl.sum(count, 0)
        items += tl.sum(pieces, 0)
    tl.store(starts + segment * (n_blocks + 1) + n_blocks, entries)
    tl.store(item_starts + segment * (n_blocks + 1) + n_blocks, items)


@triton.jit(do_not_specialize=["n_blocks", "segment_size"])
def _fill_kernel(kept, rank, starts, order, n_blocks, segment_size, SIZE: tl.constexpr):
    tiles = tl.cdiv(segment_size, SIZE)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    pair = (tl.program_id(0) % tiles) * SIZE + tl.arange(0, SIZE)
    source = segment * segment_size + pair
    block = tl.load(kept + source, mask=pair < segment_size, other=-1)
    entry = block >= 0
    start = tl.load(starts + segment * (n_blocks + 1) + block, mask=entry, other=0)
    before = tl.load(rank + source, mask=entry, other=0)
    tl.store(order + segment * segment_size + start + before, pair, mask=entry)


@triton.jit(do_not_specialize=["n_blocks", "capacity"])
def _item_kernel(
    starts, item_starts, item_block, item_first, item_length, n_blocks, capacity, ITEM: tl.constexpr, TILE: tl.constexpr
):
    tiles = tl.cdiv(n_blocks, TILE)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    block = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    inside = block < n_blocks
    at = segment * (n_blocks + 1) + block
    start = tl.load(starts + at, mask=inside, other=0)
    stop = tl.load(starts + at + 1, mask=inside, other=0)
    first = tl.load(item_starts + at, mask=inside, other=0)
    most = tl.max((stop - start + ITEM - 1) // ITEM, 0)
    for piece in range(most):
        begin = start + piece * ITEM
        target = segment * capacity + first + piece
        tl.store(item_block + target, block, mask=begin < stop)
        tl.store(item_first + target, begin, mask=begin < stop)
        tl.store(item_length + target, tl.minimum(stop - begin, ITEM), mask=begin < stop)


def build_plan(
    indices: torch.Tensor,
    n_keys: int,
    block_size: int,
    rule: str,
    positions: Positions,
    slice_length: int,
    item_queries: int,
    stable: bool = False,
) -> Plan:
    """Work items for `indices`.

    Args:
        indices: (b, hi, n, t) int32 or int64, any strides; n, t and n_keys positive.
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
    b, hi, n, t = indices.shape
    lanes, slices, n_blocks = b * hi, -(-n // slice_length), -(-n_keys // block_size)
    capacity = slice_length * t // item_queries + n_blocks

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=indices.device)

    kept, rank = ints(lanes, slices * slice_length, t), ints(lanes, slices * slice_length, t)
    counts = torch.zeros((lanes, slices, n_blocks), dtype=torch.int32, device=indices.device)
    t_pad = power_of_two(t)
    rows = max(1, 1024 // t_pad)
    offsets = positions.offsets
    _count_kernel[(lanes * -(-slices * slice_length // rows),)](
        indices, counts if offsets is None else offsets, kept, rank, counts, *indices.stride(),
        n, n_blocks, block_size, positions.offset, hi, slice_length, slices,
        T=t, T_PAD=t_pad, ROWS=rows, RULE=rule, HAS_OFFSETS=offsets is not None,
    )  # fmt: skip
    starts, item_starts = ints(lanes, slices, n_blocks + 1), ints(lanes, slices, n_blocks + 1)
    tile = min(1024, power_of_two(n_blocks))
    _layout_kernel[(lanes * slices,)](counts, starts, item_starts, n_blocks, ITEM=item_queries, TILE=tile)
    segment_size = slice_length * t
    if stable:
        key = kept.view(lanes, slices, segment_size)
        order = torch.sort(torch.where(key < 0, n_blocks, key), dim=-1, stable=True).indices.to(torch.int32)
    else:
        order = ints(lanes, slices, segment_size)
        _fill_kernel[(lanes * slices * -(-segment_size // 1024),)](
            kept, rank, starts, order, n_blocks, segment_size, SIZE=1024
        )
    item_block, item_first, item_length = (ints(lanes, slices, capacity) for _ in range(3))
    tile = min(32, power_of_two(n_blocks))
    _item_kernel[(lanes * slices * -(-n_blocks // tile),)](
        starts, item_starts, item_block, item_first, item_length, n_blocks, capacity,
        ITEM=item_queries, TILE=tile, num_warps=1,
    )  # fmt: skip
    return Plan(
        kept, order, starts, item_starts, item_block, item_first, item_length, slice_length, slices, capacity
    )


def regions(b: int, hkv: int, lane_bytes: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, key/value head) into rectangles of at most `budget` bytes, at least one pair each.

    Args:
        b: Batch size.
        hkv: Key/value heads.
        lane_bytes: Scratch of one (batch row, key/value head) over all queries.
        budget: Bytes to stay below.

    Yields:
        Slices of the batch and of the key/value heads; whole batch rows where one fits.
    """
    pairs = max(1, budget // max(lane_bytes, 1))
    rows, heads = max(1, pairs // hkv), min(hkv, pairs)
    for row in range(0, b, rows):
        for head in range(0, hkv, heads):
            yield slice(row, min(row + rows, b)), slice(head, min(head + heads, hkv))
