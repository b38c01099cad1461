"""From the scores of a tile of queries to their lists: a bit per chosen block, then the numbers.

Which blocks a query must choose follows from its position; `block_topk` chooses among those that lie between. Of more than a
section of blocks, each section leaves its best as candidates, and the same steps choose among these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block_topk import best_words, columns, count_keys, key_of, lowest_bit, no_key, range_words, words_of

WORDS = tl.constexpr(32)
"""Words of a bit per block or candidate of a query."""


@triton.jit
def forced_blocks(position, n_blocks, block_size, n_init, n_local):
    """What a query at `position` must choose: the blocks 0 ... a - 1 and b ... c - 1; what it may choose lies between."""
    own = tl.where(position >= 0, tl.maximum(position, 0) // block_size, -1)
    c = tl.minimum(own + 1, n_blocks)
    a = tl.minimum(n_init, c)
    b = tl.minimum(tl.maximum(own - n_local + 1, a), c)
    return a, b, c


@triton.jit
def _score_at(near, far, row, column, near_stride, far_stride, mask, REACHES: tl.constexpr):
    """Scores that `block_scores` left in columns of rows."""
    score = tl.load(near + row * near_stride + column, mask=mask)
    if REACHES:
        score += tl.load(far + row * far_stride + column, mask=mask)
    return score


@triton.jit
def rank_blocks(
    near, far, near_stride, far_stride, words, candidate, candidate_key, first_query, n_queries, shift, begin, end, rounds,
    n_blocks, block_size, top_k, n_init, n_local,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, REACHES: tl.constexpr, SIGNED: tl.constexpr,
    SECTIONS: tl.constexpr, LAST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """A bit for the best of the blocks begin ... end - 1, at most WIDTH, or, if LAST, of the first `end` candidates.

    For all queries of a tile, WIDTH / 32 words each, ELEMENTS scores at a time.
    """
    ROWS: tl.constexpr = QUERIES if QUERIES * WIDTH <= ELEMENTS else ELEMENTS // WIDTH
    column = columns(WIDTH)
    if not LAST:  # the scores of the next rows are on their way while rows are ranked
        following = tl.arange(0, ROWS)[:, None, None]
        near_next = tl.load(near + following * near_stride + column)
        far_next = tl.load(far + following * far_stride + column) if REACHES else near_next
    for part in range(0, QUERIES, ROWS):
        row = part + tl.arange(0, ROWS)
        a, b, c = forced_blocks(first_query + row + shift, n_blocks, block_size, n_init, n_local)
        picks = top_k - (a + c - b)
        if LAST:
            at = row[:, None, None] * (SECTIONS * SLOTS) + column
            block = tl.load(candidate + at, mask=column < end, other=-1)
            key = tl.load(candidate_key + at, mask=block >= 0, other=0)
            between = (block >= a[:, None, None]) & (block < b[:, None, None])
            key = tl.where(between, key, no_key(SIGNED))
            picks = tl.minimum(picks, count_keys(key, SIGNED))
            forced = words_of((block >= 0) & ~between, WIDTH)
        else:
            score = near_next + far_next if REACHES else near_next
            following = tl.minimum(part + ROWS, QUERIES - ROWS) + tl.arange(0, ROWS)[:, None, None]
            near_next = tl.load(near + following * near_stride + column)
            far_next = tl.load(far + following * far_stride + column) if REACHES else near_next
            first, until = tl.maximum(a - begin, 0), tl.minimum(b, end) - begin
            between = (column >= first[:, None, None]) & (column < until[:, None, None])
            key = tl.where(between, key_of(score, SIGNED), no_key(SIGNED))
            picks = tl.minimum(picks, tl.maximum(until - first, 0))
            forced = range_words(0 * a, a - begin, WIDTH) | range_words(b - begin, tl.minimum(c, end) - begin, WIDTH)
        chosen = forced | best_words(key, picks, rounds, SIGNED, WIDTH)
        tl.store(words + row[:, None] * WORDS + tl.arange(0, WIDTH // 32)[None, :], chosen)


@triton.jit
def list_blocks(
    near, far, near_stride, far_stride, words, out, candidate, candidate_key, first_query, n_queries, begin, width, section, line,
    top_k,
    QUERIES: tl.constexpr, SLOTS: tl.constexpr, REACHES: tl.constexpr, SIGNED: tl.constexpr, SECTIONS: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Writes the blocks whose bits are set in ascending order, -1 behind them; a thread per query.

    SECTIONS says for how many sections there are candidate slots; with one, the list is final.
    """
    FINAL: tl.constexpr = LAST or SECTIONS == 1
    row = tl.arange(0, QUERIES)
    live = first_query + row < n_queries
    if FINAL:
        size = top_k
        target = out + (line * n_queries + first_query + row) * top_k
    else:
        size = SLOTS
        target = candidate + (row * SECTIONS + section) * SLOTS
        target_key = candidate_key + (row * SECTIONS + section) * SLOTS
    index = row * 0
    slot = row * 0
    word = tl.load(words + row * WORDS)
    for _ in range(tl.cdiv(width, 32) + size):
        there = live & (word != 0)
        at = index * 32 + lowest_bit(word)
        if LAST:
            block = tl.load(candidate + row * (SECTIONS * SLOTS) + at, mask=there)
        else:
            block = begin + at
        tl.store(target + slot, block, mask=there)
        if not FINAL:
            score = _score_at(near, far, row, at, near_stride, far_stride, there, REACHES)
            tl.store(target_key + slot, key_of(score, SIGNED), mask=there)
        slot += there.to(tl.int32)
        done = live & (word == 0) & (index + 1 < tl.cdiv(width, 32))
        index += done.to(tl.int32)
        word = tl.where(done, tl.load(words + row * WORDS + index, mask=done, other=0), word & (word - 1))
    behind = tl.arange(0, SLOTS)[None, :]
    empty = tl.full((QUERIES, SLOTS), -1, tl.int32)
    tl.store(target[:, None] + behind, empty, mask=(behind >= slot[:, None]) & (behind < size) & live[:, None])
