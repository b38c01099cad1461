"""What the forward and the backward kernel of selected attention share: reading a work item, and who sees which key."""

from __future__ import annotations

import triton
import triton.language as tl


LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
CHANGING = ("first_lane", "begin_lane", "slice_index", "n_slices", "slice_length", "capacity", "n_keys", "n_blocks", "offset")
"""Arguments of the attention kernels that vary from call to call: no kernel is compiled for 1 or for multiples of 16."""


@triton.jit
def load_item(item_starts, item_block, item_first, item_length, segment, item, n_blocks, capacity):
    """Block, first entry and length of a work item; length 0 past the segment's last item."""
    live = item < tl.load(item_starts + segment * (n_blocks + 1) + n_blocks)
    at = segment * capacity + item
    block = tl.load(item_block + at, mask=live, other=0)
    first = tl.load(item_first + at, mask=live, other=0)
    length = tl.load(item_length + at, mask=live, other=0)
    return block, first, length


@triton.jit
def last_visible(position, block, n_keys, BLOCK_SIZE: tl.constexpr, RULE: tl.constexpr):
    """(rows,): the last key of the listed `block` that each query sees. Under every rule it sees the block up to there."""
    last = tl.minimum(n_keys, (block + 1) * BLOCK_SIZE) - 1
    if RULE == "causal":
        last = tl.minimum(position, last)
    elif RULE == "diagonal":
        own = (position >= block * BLOCK_SIZE) & (position < (block + 1) * BLOCK_SIZE)
        last = tl.where(own, tl.minimum(position, last), last)
    else:
        last = position * 0 + last
    return last


@triton.jit
def tile_mask(row_mask, column, D: tl.constexpr, D_PAD: tl.constexpr):
    """(rows, D_PAD): the rows of `row_mask`, the first D columns; no work where D needs no padding."""
    mask = row_mask[:, None]
    if D != D_PAD:
        mask = mask & (column < D)[None, :]
    return mask
