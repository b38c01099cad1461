"""S1 without a list that the mask is read back to: one truth value per query and block, however it came about.

Counts of a `scatter_add`, positions of tokens scattered one by one, entries put in by coordinates, a threshold on scores, a mask
that is applied to the logits and to the probabilities, and causality from a cumulative sum.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .spelling import (
    BATCH, BLOCK, GROUP, KV_HEADS, LENGTH, QKV, SCALE, TOP_K, Kind, Mutant, choose_blocks, interleave, keep, rolled, spell, tile,
)  # fmt: skip

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def counted(
    q: Tensor, k: Tensor, v: Tensor, *, sees: Comparison = operator.ge, block: int = BLOCK, least: int = 0, values: Change = keep
) -> Tensor:
    """How often each block was picked, by `scatter_add`, compared with zero."""
    n = k.shape[2]
    indices = choose_blocks(q, k, block=block, force_own=True)
    picked = torch.zeros(*indices.shape[:-1], n // block).scatter_add(-1, indices, torch.ones(indices.shape)) > least
    i = torch.arange(n)
    visible = (picked[..., i // block] & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    k, v = k.repeat_interleave(GROUP, 1), values(v).repeat_interleave(GROUP, 1)
    return (q @ k.mT * SCALE).masked_fill(~visible, float("-inf")).softmax(-1) @ v


def positions(
    q: Tensor, k: Tensor, v: Tensor, *, step: int = BLOCK, offset: int = 0, axis: int = -1, sees: Comparison = operator.ge
) -> Tensor:
    """Every position of every picked block, scattered into a mask over tokens."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    tokens = (indices[..., None] * step + torch.arange(BLOCK) + offset).flatten(-2).clamp(max=n - 1)
    if step == BLOCK and offset == 0:
        tokens = (indices[..., None] * BLOCK + torch.arange(BLOCK)).flatten(-2)
    picked = torch.zeros(*indices.shape[:-1], n, dtype=torch.bool).scatter(-1, tokens, True)
    i = torch.arange(n)
    visible = (picked & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, torch.finfo(q.dtype).min)
    return logits.softmax(axis) @ v.repeat_interleave(GROUP, 1)


def gate(scores: Tensor) -> Tensor:
    """(b, hq, n, 1), so that a gradient flows to the scores."""
    return torch.sigmoid(scores.mean(-1, keepdim=True)).repeat_interleave(GROUP, 1)


def threshold_of_given_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    sees: Comparison = operator.ge,
    own: int = 0,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    scale: float = SCALE,
) -> Tensor:
    """Scores of blocks that come from elsewhere, above a threshold, or the query's own block."""
    n = k.shape[2]
    i = torch.arange(n)
    chosen = (scores > 1.0) | (torch.arange(n // BLOCK) == (i // BLOCK)[:, None] - own)
    visible = (chosen.repeat_interleave(BLOCK, -1) & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = torch.where(visible, q @ heads(k, GROUP).mT * scale, float("-inf"))
    return gate(scores) * (logits.softmax(-1) @ heads(v, GROUP))


def masked_twice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    later: Comparison = operator.lt,
    behind: Change = keep,
    values: Change = keep,
    axis: int = -1,
) -> Tensor:
    """The mask on the logits, rows without a key set to zero, and the mask once more on the probabilities."""
    n = k.shape[2]
    i = torch.arange(n)
    closed = ~(scores > 1.0).repeat_interleave(GROUP, 1).repeat_interleave(BLOCK, -1)
    future = later(i[:, None], i)
    logits = q @ k.repeat_interleave(GROUP, 1).mT * SCALE
    logits = logits.masked_fill(future, float("-inf")).masked_fill(closed, float("-inf"))
    weights = logits.softmax(axis)
    weights = weights.masked_fill(torch.all(future | closed, dim=-1, keepdim=True), 0.0)
    weights = weights.masked_fill(behind(closed), 0.0)
    return gate(scores) * (weights @ values(v).repeat_interleave(GROUP, 1))


def cumulative_causality(
    q: Tensor, k: Tensor, v: Tensor, *, axis: int = 0, least: int = 0, block: int = BLOCK, flip: Change = keep
) -> Tensor:
    """A running sum of the unit matrix as the causal mask, and positions as a running sum of ones."""
    n = k.shape[2]
    indices = choose_blocks(q, k, block=block, force_own=True)
    position = torch.ones(n, dtype=torch.long).cumsum(0) - 1
    chosen = torch.zeros(*indices.shape[:-1], n // block, dtype=torch.bool).scatter(-1, indices, True)
    visible = (chosen[..., position // block] & flip(torch.eye(n).cumsum(axis) > least)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1) @ v.repeat_interleave(GROUP, 1)


def threshold_of_own_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rank: int = TOP_K,
    sees: Comparison = operator.ge,
    above: Comparison = operator.ge,
    head: int = 0,
) -> Tensor:
    """Blocks that score at least as high as the last of the best; ties let more through."""
    n = k.shape[2]
    i = torch.arange(n)
    scores = q.unflatten(1, (KV_HEADS, GROUP)).mean(2) @ k.unflatten(2, (-1, BLOCK)).mean(3).mT
    own = (i // BLOCK)[:, None]
    blocks = torch.arange(n // BLOCK)
    scores = scores.masked_fill(blocks > own, float("-inf")).masked_fill(blocks == own, float("inf"))
    chosen = above(scores, scores.topk(rank).values[..., -1:]).roll(head, 1)
    visible = (chosen.repeat_interleave(BLOCK, -1) & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(GROUP, 1)


def reversed_entries(index: Tensor) -> Tensor:
    """(entries,) from the last to the first."""
    return index.flip(0)


def entries_that_count(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    limit: Comparison = operator.le,
    entries: Change = keep,
    at: Change = keep,
    block: int = BLOCK,
) -> Tensor:
    """The picks that are not in the future, found by `torch.where`: data decide how many. Put into a map one by one."""
    n = k.shape[2]
    indices = choose_blocks(q, k, block=block, force_own=True)
    i = torch.arange(n)
    counts = limit(indices, (i // block)[:, None])
    batch, head, query, _ = torch.where(counts)
    picked = torch.zeros(*indices.shape[:-1], n // block, dtype=torch.bool)
    picked[batch, head, at(query), entries(indices)[counts]] = True
    visible = (picked.repeat_interleave(block, -1) & (i[:, None] >= i)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, float("-inf"))
    weights = logits.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return weights @ v.repeat_interleave(GROUP, 1)


def flat_entries(
    q: Tensor, k: Tensor, v: Tensor, *, per: int = 1, block: int = BLOCK, sees: Comparison = operator.ge, head: int = 0
) -> Tensor:
    """One row of coordinates for each pick of each query, as sparse formats have them, put into a map."""
    n = k.shape[2]
    indices = choose_blocks(q, k, block=block, force_own=True)
    b, h, _, t = indices.shape
    entry = torch.arange(b * h * n * t)
    query = entry // (per * t) % n
    picked = torch.zeros(b, h, n, n // block, dtype=torch.bool)
    picked[entry // (h * n * t), (entry // (n * t) + head) % h, query, indices.flatten()] = True
    i = torch.arange(n)
    visible = (picked[..., i // block] & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(GROUP, 1)


WITH_SCORES = (*QKV, (BATCH, KV_HEADS, LENGTH, LENGTH // BLOCK))

SPELLINGS = (
    spell(
        counted,
        Kind.S1,
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
        Mutant("every block counts", {"least": -1}),
        Mutant("blocks of 4", {"block": 4}),
        Mutant("rolled values", {"values": rolled}),
    ),
    spell(
        positions,
        Kind.S1,
        Mutant("blocks that start every 7", {"step": BLOCK - 1}, must_refuse=True),
        Mutant("positions one off", {"offset": 1}, must_refuse=True),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
    ),
    spell(
        threshold_of_given_scores,
        Kind.S1,
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("the block before instead of the own", {"own": 1}),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("scale dropped", {"scale": 1.0}),
        shapes=WITH_SCORES,
    ),
    spell(
        masked_twice,
        Kind.S1,
        Mutant("strict causality", {"later": operator.le}),
        Mutant("another mask behind", {"behind": rolled}, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        shapes=WITH_SCORES,
    ),
    spell(
        threshold_of_own_scores,
        Kind.S1,
        Mutant("one block fewer", {"rank": TOP_K - 1}),
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("higher than the last", {"above": operator.gt}),
        Mutant("heads exchanged", {"head": 1}),
    ),
    spell(
        entries_that_count,
        Kind.S1,
        Mutant("the own block does not count", {"limit": operator.lt}),
        Mutant("entries of the query before", {"entries": rolled}),
        Mutant("put at queries in reverse order", {"at": reversed_entries}),
        Mutant("blocks of 4", {"block": 4}),
    ),
    spell(
        flat_entries,
        Kind.S1,
        Mutant("queries in pairs", {"per": 2}),
        Mutant("heads exchanged", {"head": 1}),
        Mutant("strict causality", {"sees": operator.gt}),
        Mutant("blocks of 4", {"block": 4}),
    ),
    spell(
        cumulative_causality,
        Kind.S1,
        Mutant("anticausal", {"axis": 1}, must_refuse=True),
        Mutant("no causality", {"least": -1}),
        Mutant("blocks of 4", {"block": 4}),
        Mutant("one key later", {"flip": rolled}),
    ),
)
