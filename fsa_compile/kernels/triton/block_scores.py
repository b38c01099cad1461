"""Scores of blocks of tokens for a tile of queries, left in the program's own scratch rows.

Rule "sum" (`reference.select_blocks`): for each tile of compressed keys

    p = exp2(k q^T * scale * log2(e) - lse * log2(e)), masked          (keys, heads * queries)
    x = sum of p over the heads                                        (keys, queries)
    near = sum over a block's keys of x * strides shared with the block
    far = the same with the next block, which the last keys reach into

Keys go down and (head, query) pairs across, heads outermost, and the rows of a tile are ordered so that the keys of one block
lie 8 and 64 rows apart: on Hopper both sums then stay inside a thread. The score of block j is near[j] + far[j - 1].

Rule "max" (`reference.select_blocks_by_max`): queries down, keys across; near = the largest logit of the block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bands import load_rows


@triton.jit
def _pool(x, HIGH: tl.constexpr, BLOCKS_HIGH: tl.constexpr, LOW: tl.constexpr, BLOCKS_LOW: tl.constexpr, QUERIES: tl.constexpr):
    """(blocks, queries) from (keys, queries): sums over the two parts of a key's place in its block."""
    x = tl.sum(tl.reshape(x, (HIGH, BLOCKS_HIGH, LOW, BLOCKS_LOW, QUERIES)), 2)
    return tl.reshape(tl.sum(x, 0), (BLOCKS_HIGH * BLOCKS_LOW, QUERIES))


@triton.jit
def score_by_sum(
    near, far, near_stride, far_stride, q_tile, lse_row, stop, k_base, k_stride_n, begin, first, end, prefix, stride, kernel_size,
    block_size, log2_scale, n_keys,
    D: tl.constexpr, D_PAD: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr,
    HIGH: tl.constexpr, BLOCKS_LOW: tl.constexpr, REACHES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks first ... end - 1 into columns counted from block `begin`; unless MASKED, all rows see all keys."""
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    BLOCKS_HIGH: tl.constexpr = BLOCKS // BLOCKS_LOW
    LOW: tl.constexpr = PER_BLOCK // HIGH
    i = tl.arange(0, KEYS)
    place = i // (BLOCKS_LOW * LOW * BLOCKS_HIGH) * LOW + i // BLOCKS_LOW % LOW
    within = i // (BLOCKS_LOW * LOW) % BLOCKS_HIGH * BLOCKS_LOW + i % BLOCKS_LOW
    here = tl.minimum(kernel_size, block_size - place * stride).to(tl.float32) / stride
    there = tl.maximum(place * stride + kernel_size - block_size, 0).to(tl.float32) / stride
    c = tl.arange(0, D_PAD)
    block = tl.arange(0, BLOCKS)
    query = tl.arange(0, QUERIES)
    for front in range(first, end, BLOCKS):
        key = prefix + (front + within) * PER_BLOCK + place
        k_tile = load_rows(k_base, key, k_stride_n, c, key < n_keys, D, D_PAD, MASKED)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * log2_scale - lse_row[None, :]
        if MASKED:
            s = tl.where(key[:, None] < stop[None, :], s, float("-inf"))
        x = tl.sum(tl.reshape(tl.exp2(s), (KEYS, HEADS, QUERIES)), 1)
        at = front - begin + block
        pooled = _pool(x * here[:, None], HIGH, BLOCKS_HIGH, LOW, BLOCKS_LOW, QUERIES)
        tl.store(near + query[None, :] * near_stride + at[:, None], pooled)
        if REACHES:
            pooled = _pool(x * there[:, None], HIGH, BLOCKS_HIGH, LOW, BLOCKS_LOW, QUERIES)
            tl.store(far + query[None, :] * far_stride + at[:, None] + 1, pooled)


@triton.jit
def score_by_max(
    near, near_stride, q_tile, stop, k_base, k_stride_n, begin, first, end, n_keys,
    D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """As `score_by_sum`: the largest logit of each block."""
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    c = tl.arange(0, D_PAD)
    block = tl.arange(0, BLOCKS)
    query = tl.arange(0, QUERIES)
    for front in range(first, end, BLOCKS):
        key = front * PER_BLOCK + tl.arange(0, KEYS)
        k_tile = load_rows(k_base, key, k_stride_n, c, key < n_keys, D, D_PAD, MASKED)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            s = tl.where(key[None, :] < stop[:, None], s, float("-inf"))
        best = tl.max(tl.reshape(s, (QUERIES, BLOCKS, PER_BLOCK)), 2)
        tl.store(near + query[:, None] * near_stride + (front - begin + block)[None, :], best)
