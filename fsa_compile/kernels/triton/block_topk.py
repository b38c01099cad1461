"""The best k of a row of scores, ties to the lower block: a threshold, a bit per block, then the numbers in ascending order.

    m = +max;  k times:  m = the largest key below m                        distinct keys, one max over the row each
    words = a bit for every key from m on
    unless that leaves k of them (some are equal): again, counting them, and of the keys that equal m only the first
    then, a thread per row: the bits of the words, lowest first

Keys are 32-bit integers in the order of the scores. The threshold needs no indices, and bits come out in order by themselves.
Rows have three dimensions, (rows, width / 128, 128): so a warp holds whole rows, and no max crosses warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_KEY = tl.constexpr(2147483647)


@triton.jit
def no_key(SIGNED: tl.constexpr):
    """The key of what cannot be chosen, below all others."""
    return -2147483648 if SIGNED else -1


@triton.jit
def key_of(score, SIGNED: tl.constexpr):
    """int32 in the order of float32 scores; unless SIGNED, scores are not negative, and NaN counts as 0."""
    if SIGNED:
        bits = score.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 2147483647)
    else:
        key = tl.maximum(score, 0.0).to(tl.int32, bitcast=True)
    return key


@triton.jit
def columns(WIDTH: tl.constexpr):
    """(1, width / 128, 128): the columns of a row."""
    LANES: tl.constexpr = WIDTH if WIDTH < 128 else 128
    return tl.arange(0, WIDTH // LANES)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]


@triton.jit
def _count(seen):
    return tl.sum(tl.sum(seen.to(tl.int32), 1), 1)


@triton.jit
def count_keys(key, SIGNED: tl.constexpr):
    """(rows,): keys other than `no_key`."""
    return _count(key != no_key(SIGNED))


@triton.jit
def _largest_below(key, m, SIGNED: tl.constexpr):
    """(rows,): the largest key below m, or `no_key`."""
    if SIGNED:
        return tl.max(tl.max(tl.where(key < m[:, None, None], key, -2147483648), 1), 1)
    else:  # key - m wraps around where key < m, and so is larger, as an unsigned number, than where it is not
        step = tl.max(tl.max((key - m[:, None, None]).to(tl.uint32, bitcast=True), 1), 1).to(tl.int32, bitcast=True)
        return tl.where(step < 0, m + step, -1)


@triton.jit
def words_of(chosen, WIDTH: tl.constexpr):
    """(rows, width / 32) int32: a bit for each column."""
    bits = chosen.to(tl.int32) << (columns(WIDTH) & 31)
    return tl.sum(tl.reshape(bits, (bits.shape[0], WIDTH // 32, 32)), 2)


@triton.jit
def best_words(key, picks, rounds, SIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, width / 32) int32: a bit for each of the best keys of a row.

    Args:
        key: (rows, width / 128, 128) int32.
        picks: (rows,) how many, at most as many as there are other than `no_key`.
        rounds: At least all of `picks`.
    """
    m = picks * 0 + MOST_KEY
    for i in range(rounds):
        below = _largest_below(key, m, SIGNED)
        m = tl.where((i < picks) & (below != no_key(SIGNED)), below, m)
    chosen = key >= m[:, None, None]
    words = words_of(chosen, WIDTH)
    if tl.max((_count(chosen) != picks).to(tl.int32), 0) > 0:
        column = columns(WIDTH)
        m = picks * 0 + MOST_KEY
        left = picks
        for _ in range(rounds):
            below = _largest_below(key, m, SIGNED)
            m = tl.where(left > 0, below, m)
            left -= tl.where(left > 0, _count(key == below[:, None, None]), 0)
        above = key > m[:, None, None]
        left = picks - _count(above)
        until = picks * 0 - 1
        for i in range(tl.max(left, 0)):
            later = (key == m[:, None, None]) & (column > until[:, None, None])
            following = tl.min(tl.min(tl.where(later, column, WIDTH), 1), 1)
            until = tl.where(i < left, following, until)
        words = words_of(above | ((key == m[:, None, None]) & (column <= until[:, None, None])), WIDTH)
    return words


@triton.jit
def range_words(first, end, WIDTH: tl.constexpr):
    """(rows, width / 32) int32: a bit for each of the columns first ... end - 1, both (rows,)."""
    start = tl.arange(0, WIDTH // 32)[None, :] * 32
    low = tl.minimum(tl.maximum(first[:, None] - start, 0), 32).to(tl.int64)
    high = tl.minimum(tl.maximum(end[:, None] - start, 0), 32).to(tl.int64)
    one = (low * 0 + 1).to(tl.int64)
    return tl.where(low < high, (one << high) - (one << low), 0).to(tl.int32)


@triton.jit
def lowest_bit(word):
    """Index of the lowest bit of a word that is not 0."""
    power = (word & (0 - word)).to(tl.uint32, bitcast=True).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127
