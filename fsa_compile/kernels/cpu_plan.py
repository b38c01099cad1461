"""Turns per-query block lists into tiles of queries that share a block: the order in which selected attention works.

A *row* is one (head, query) pair of the pass at hand; an *entry* is one place (head, query, slot) of the index list. A tile
holds up to `rows` rows, all of which list the tile's block. The plan is one sort and a few prefix sums over the entries, on the
device of the indices. Where reading the device from the host would stall it, sizes are bounds instead (`exact`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TilePlan:
    """Which rows meet which block, tile by tile, ordered by block.

    Args:
        row: Row at each place of each tile, (tiles, rows) int64; heads * n for an unused place.
        block: Block number of each tile, (tiles,).
        head: Index head of each tile, (tiles,).
        place: Where each entry went, (heads, n, t): a flat index into `row`, or tiles * rows for an entry that counts nothing
            (negative, past the last block, a duplicate, or without a visible key).
        masked: First tile that may hold a key that one of its rows does not see.
    """

    row: Tensor
    block: Tensor
    head: Tensor
    place: Tensor
    masked: int


def visible_keys(positions: Tensor, block: Tensor, block_size: int, m: int, rule: str) -> Tensor:
    """How many keys of a listed block a query sees; under every rule they are the block's first keys.

    Args:
        positions: Query positions.
        block: Block numbers, broadcastable with `positions`; numbers outside of 0 .. ceil(m / block_size) - 1 give 0.
        block_size: Keys per block.
        m: Number of keys.
        rule: "causal", "listed" or "diagonal".
    """
    first = block * block_size
    size = (m - first).clamp(max=block_size).masked_fill(block < 0, 0)
    if rule == "listed":
        return torch.broadcast_to(size, torch.broadcast_shapes(size.shape, positions.shape)).clamp(min=0)
    causal = torch.minimum(positions - first + 1, size)
    if rule == "diagonal":
        causal = torch.where(positions.div(block_size, rounding_mode="floor") == block, causal, size)
    return causal.clamp(min=0)


def plan_tiles(indices: Tensor, positions: Tensor, block_size: int, m: int, rule: str, rows: int, exact: bool) -> TilePlan:
    """Groups the entries of `indices` into tiles.

    Args:
        indices: Block numbers (heads, n, t), any integers.
        positions: Query positions (heads or 1, n), int64.
        block_size: Keys per block.
        m: Number of keys.
        rule: "causal", "listed" or "diagonal".
        rows: Rows per tile.
        exact: Read the number of tiles, and which may need a mask, on the host. Otherwise the plan ends in unused tiles, and
            masks start at the first.
    """
    heads, n, _ = indices.shape
    device = indices.device
    blocks = -(-m // block_size)
    buckets = blocks * heads
    row = torch.arange(heads * n, device=device).view(heads, n, 1)
    indices = indices.long().clamp(-1, blocks)
    counts = visible_keys(positions[..., None], indices, block_size, m, rule) > 0
    # Sorting (block, row) keys groups by block and puts duplicates of a list next to each other.
    keys = torch.where(counts, indices * (heads * n) + row, buckets * n).flatten()
    keys, order = keys.sort(stable=True)
    fresh = keys < buckets * n
    fresh[1:] &= keys[1:] != keys[:-1]
    rank = torch.nn.functional.pad(fresh.cumsum(0), (1, 0))
    edges = torch.searchsorted(keys, torch.arange(buckets + 1, device=device) * n)
    first = rank[edges]
    ends = (first.diff() + rows - 1).div(rows, rounding_mode="floor").cumsum(0)
    # The bound: every bucket in use wastes less than one tile.
    tiles = int(ends[-1]) if exact else keys.numel() // rows + min(buckets, keys.numel())

    bucket = keys.div(n, rounding_mode="floor").clamp(max=buckets - 1)
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    slot = torch.where(fresh, starts[bucket] * rows + rank[:-1] - first[bucket], tiles * rows)
    rows_of = torch.full((tiles * rows + 1,), heads * n, dtype=torch.int64, device=device)
    rows_of[slot] = torch.where(fresh, keys % (heads * n), heads * n)
    place = torch.empty_like(slot)
    place[order] = slot
    bucket = torch.searchsorted(ends, torch.arange(tiles, device=device), right=True).clamp(max=buckets - 1)
    block = bucket.div(heads, rounding_mode="floor")
    return TilePlan(
        row=rows_of[:-1].view(tiles, rows),
        block=block,
        head=bucket % heads,
        place=place.view(indices.shape),
        masked=_first_masked(block, positions, block_size, m, rule) if exact else 0,
    )


def _first_masked(block: Tensor, positions: Tensor, block_size: int, m: int, rule: str) -> int:
    """First tile with a key that some row may not see: blocks that end before the first query's own are seen whole."""
    whole = m // block_size
    if rule != "listed":
        whole = min(whole, (int(positions.min()) + 1) // block_size)
    return int(torch.searchsorted(block, whole))
