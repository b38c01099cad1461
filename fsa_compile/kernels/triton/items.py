"""What the forward and the backward kernel of selected attention share: reading a work item, and who sees which key."""

from __future__ import annotations

import triton
import triton.language as tl


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
def visible(position, key, block, n_keys, BLOCK_SIZE: tl.constexpr, RULE: tl.constexpr):
    """(rows, keys): which keys of the listed `block` the queries at `position` see."""
    seen = ((key < n_keys) & (key < (block + 1) * BLOCK_SIZE))[None, :]
    if RULE == "causal":
        seen = seen & (key[None, :] <= position[:, None])
    if RULE == "diagonal":
        own = (position >= block * BLOCK_SIZE) & (position < (block + 1) * BLOCK_SIZE)
        seen = seen & ((key[None, :] <= position[:, None]) | (own == 0)[:, None])
    return seen
