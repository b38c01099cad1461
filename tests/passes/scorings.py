"""Layers that rank blocks by the probabilities of their compressed branch, in many ways, and slips of the pen in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn, Tensor

BATCH, LENGTH, DIM, HEADS, KV_HEADS, BLOCK, TOP_K = 2, 96, 8, 4, 2, 16, 4
GROUP = HEADS // KV_HEADS

Rank = Callable[[Tensor, Tensor], Tensor]


def whole_blocks(x: Tensor) -> Tensor:
    """Keys (b, hkv, n, d) compressed by the mean of each block."""
    return x.unflatten(2, (-1, BLOCK)).mean(3)


def overlapping(x: Tensor) -> Tensor:
    """Keys (b, hkv, n, d) compressed by the mean of 8 tokens every 4."""
    return x.unfold(2, 8, 4).mean(-1)


@dataclass
class Scoring:
    """One way to choose blocks.

    Attributes:
        rank: From probabilities (b, hq, n, c) and positions (n,) to scores (b, hkv, n, blocks).
        compress: From keys to compressed keys.
        stride, last: When they are seen.
        listed: From scores to a list (b, hkv, n, t).
        slips: Changed scorings that the op does not compute; each is a scoring of its own.
    """

    rank: Rank
    compress: Callable[[Tensor], Tensor] = whole_blocks
    stride: int = BLOCK
    last: int = BLOCK - 1
    listed: Callable[[Tensor, Tensor], Tensor] = lambda scores, i: scores.topk(TOP_K, -1).indices
    slips: dict[str, Scoring] = field(default_factory=dict)


class Layer(nn.Module):
    """Compressed and selected attention over one projection, summed.

    Args:
        scoring: How blocks are chosen.
        selected_first: Whether the output of the selected branch is computed before that of the compressed one.
    """

    def __init__(self, scoring: Scoring, selected_first: bool = False) -> None:
        super().__init__()
        self.scoring, self.selected_first = scoring, selected_first
        self.project = nn.Linear(32, (HEADS + 2 * KV_HEADS) * DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s, n = self.scoring, x.shape[1]
        q, k, v = self.project(x).unflatten(-1, (-1, DIM)).transpose(1, 2).split((HEADS, KV_HEADS, KV_HEADS), 1)
        i = torch.arange(n)
        small_k, small_v = (s.compress(t).repeat_interleave(GROUP, 1) for t in (k, v))
        begins = torch.arange(small_k.shape[2]) * s.stride
        logits = (q @ small_k.transpose(-1, -2) * DIM**-0.5).masked_fill(begins + s.last > i[:, None], float("-inf"))
        p = logits.softmax(-1).nan_to_num(0.0)
        blocks = torch.zeros(x.shape[0], KV_HEADS, n, -(-n // BLOCK) + 1, dtype=torch.bool)
        listed = s.listed(s.rank(p, i), i)
        blocks = blocks.scatter(-1, listed.where(listed >= 0, -(-n // BLOCK)), True)[..., :-1]
        seen = blocks.repeat_interleave(BLOCK, -1).repeat_interleave(GROUP, 1) & (i[:, None] >= i)
        dense = (q @ k.repeat_interleave(GROUP, 1).transpose(-1, -2) * DIM**-0.5).masked_fill(~seen, float("-inf"))
        if self.selected_first:
            chosen = dense.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(GROUP, 1)
            return p @ small_v + chosen
        return p @ small_v + dense.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(GROUP, 1)


def grouped(p: Tensor) -> Tensor:
    """Probabilities (b, hq, n, c) summed over the query heads of a group."""
    return p.unflatten(1, (KV_HEADS, GROUP)).sum(2)


def own(i: Tensor, blocks: int, before: int = 0) -> Tensor:
    """(n, blocks): the query's own block and some before it."""
    distance = i[:, None] // BLOCK - torch.arange(blocks)
    return (distance >= 0) & (distance <= before)


def force_own(scores: Tensor, i: Tensor, before: int = 0, value: float = float("inf")) -> Tensor:
    return scores.masked_fill(own(i, scores.shape[-1], before), value)


def hide_future(scores: Tensor, i: Tensor, ahead: int = 0) -> Tensor:
    return scores.masked_fill(torch.arange(scores.shape[-1]) * BLOCK > i[:, None] + ahead, float("-inf"))


def overlap(length: int = 8, size: int = BLOCK, first: int = 0) -> Tensor:
    """(c, blocks): shared tokens, by strides of 4."""
    begin = torch.arange((LENGTH - 8) // 4 + 1)[:, None] * 4
    start = torch.arange(LENGTH // BLOCK) * BLOCK + first
    shared = torch.minimum(begin + length, start + size) - torch.maximum(begin, start)
    return shared.clamp(min=0).float() / 4


def shifted_sums(p: Tensor, kernel: int = 2, per_block: int = 4, skip: int = 0) -> Tensor:
    """Equation 9, read with 0-based indices from the first key that overlaps a block."""
    blocks = LENGTH // BLOCK
    padded = F.pad(p, (kernel - 1 + skip, per_block))
    total = 0
    for m in range(per_block):
        for step in range(kernel):
            total = total + padded[..., m + step :: per_block][..., :blocks]
    return total


SCORINGS: dict[str, Scoring] = {
    "group_sum": Scoring(
        lambda p, i: force_own(grouped(p), i),
        slips={
            "first_head": Scoring(lambda p, i: force_own(p[:, ::GROUP], i)),
            "tiled_heads": Scoring(lambda p, i: force_own(p.unflatten(1, (GROUP, KV_HEADS)).sum(1), i)),
            "squares": Scoring(lambda p, i: force_own(grouped(p * p), i)),
            "largest_of_group": Scoring(lambda p, i: force_own(p.unflatten(1, (KV_HEADS, GROUP)).amax(2), i)),
            "smallest": Scoring(
                lambda p, i: force_own(grouped(p), i), listed=lambda s, i: (-s).topk(TOP_K, -1).indices
            ),
            "forced_by_one": Scoring(lambda p, i: force_own(grouped(p), i, value=1.0)),
            "own_not_forced": Scoring(lambda p, i: grouped(p)),
            "earlier_query": Scoring(lambda p, i: force_own(grouped(p).roll(1, 2), i)),
            "next_block": Scoring(lambda p, i: force_own(grouped(p).roll(1, 3), i)),
            "too_many_forced": Scoring(lambda p, i: force_own(grouped(p), i, before=TOP_K)),
            "gap": Scoring(lambda p, i: force_own(grouped(p), i - BLOCK)),
            "rounded": Scoring(lambda p, i: force_own((grouped(p) * 8).floor(), i)),
        },
    ),
    "group_mean_hidden_future": Scoring(
        lambda p, i: hide_future(force_own(p.unflatten(1, (KV_HEADS, GROUP)).mean(2), i, before=1), i),
        slips={
            "hides_one_more": Scoring(
                lambda p, i: hide_future(force_own(p.unflatten(1, (KV_HEADS, GROUP)).mean(2), i, before=1), i, ahead=-1)
            ),
        },
    ),
    "detached_first_and_own": Scoring(
        lambda p, i: force_own(grouped(p).detach(), i).masked_fill(torch.arange(LENGTH // BLOCK) == 0, float("inf")),
        slips={
            "second": Scoring(
                lambda p, i: force_own(grouped(p), i).masked_fill(torch.arange(LENGTH // BLOCK) == 1, float("inf"))
            ),
        },
    ),
    "added_bonus": Scoring(
        lambda p, i: grouped(p) + own(i, LENGTH // BLOCK).float() * 1e4,
        slips={"small_bonus": Scoring(lambda p, i: grouped(p) + own(i, LENGTH // BLOCK).float() * 0.5)},
    ),
    "einsum_of_group": Scoring(
        lambda p, i: force_own(torch.einsum("bhgnc->bhnc", p.unflatten(1, (KV_HEADS, GROUP))), i),
        slips={
            "weighted": Scoring(
                lambda p, i: force_own(
                    torch.einsum("bhgnc,g->bhnc", p.unflatten(1, (KV_HEADS, GROUP)), torch.arange(1.0, GROUP + 1)), i
                )
            ),
        },
    ),
    "overlap_matrix": Scoring(
        lambda p, i: force_own(grouped(p @ overlap()), i), overlapping, 4, 7,
        slips={
            "longer_keys": Scoring(lambda p, i: force_own(grouped(p @ overlap(12)), i), overlapping, 4, 7),
            "later_blocks": Scoring(lambda p, i: force_own(grouped(p @ overlap(first=4)), i), overlapping, 4, 7),
            "touches": Scoring(lambda p, i: force_own(grouped(p @ (overlap() > 0).float()), i), overlapping, 4, 7),
        },
    ),
    "starts_in_block": Scoring(
        lambda p, i: force_own(F.pad(grouped(p), (0, 1)).unflatten(-1, (-1, 4)).sum(-1), i), overlapping, 4, 7,
        slips={
            "starts_later": Scoring(
                lambda p, i: force_own(F.pad(grouped(p), (1, 0)).unflatten(-1, (-1, 4)).sum(-1), i), overlapping, 4, 7
            ),
        },
    ),
    "equation_nine": Scoring(
        lambda p, i: force_own(shifted_sums(grouped(p)), i), overlapping, 4, 7,
        slips={"shifted": Scoring(lambda p, i: force_own(shifted_sums(grouped(p), skip=1), i), overlapping, 4, 7)},
    ),
    "minus_one_for_none": Scoring(
        lambda p, i: hide_future(force_own(grouped(p), i), i),
        listed=lambda s, i: (lambda t: t.indices.masked_fill(t.values == float("-inf"), -1))(s.topk(TOP_K, -1)),
        slips={
            "threshold": Scoring(
                lambda p, i: hide_future(force_own(grouped(p), i), i),
                listed=lambda s, i: (lambda t: t.indices.masked_fill(t.values < 0.2, -1))(s.topk(TOP_K, -1)),
            ),
        },
    ),
    "own_appended": Scoring(
        lambda p, i: force_own(grouped(p), i, value=float("-inf")),
        listed=lambda s, i: torch.cat((s.topk(TOP_K, -1).indices, (i // BLOCK)[:, None].expand(*s.shape[:3], 1)), -1),
        slips={
            "may_be_picked_too": Scoring(
                lambda p, i: force_own(grouped(p), i, value=1e-3),
                listed=lambda s, i: torch.cat((s.topk(TOP_K, -1).indices, (i // BLOCK)[:, None].expand(*s.shape[:3], 1)), -1),
            ),
            "first_appended": Scoring(
                lambda p, i: force_own(grouped(p), i),
                listed=lambda s, i: torch.cat((torch.zeros_like(s[..., :1], dtype=torch.int64), s.topk(TOP_K, -1).indices), -1),
            ),
            "all_but_one_pick": Scoring(
                lambda p, i: force_own(grouped(p), i), listed=lambda s, i: s.topk(TOP_K, -1).indices[..., 1:]
            ),
        },
    ),
    "own_in_front": Scoring(
        lambda p, i: force_own(grouped(p), i, value=-1.0),
        listed=lambda s, i: torch.cat(((i // BLOCK)[:, None].expand(*s.shape[:3], 1), s.topk(TOP_K, -1).indices), -1),
    ),
    "huge_scores": Scoring(
        lambda p, i: force_own(1000 * grouped(p), i, value=1e5),
        slips={"not_above": Scoring(lambda p, i: force_own(1000 * grouped(p), i, value=100.0))},
    ),
}


Indexer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Indexed(nn.Module):
    """Selected attention whose blocks are ranked by an indexer of one head for each key/value head.

    Args:
        scores: From the indexer's queries (b, hkv, n, d), keys (b, 1, n, d) and positions to scores (b, hkv, n, blocks).
    """

    def __init__(self, scores: Indexer) -> None:
        super().__init__()
        self.scores = scores
        self.project = nn.Linear(32, (HEADS + 3 * KV_HEADS + 1) * DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).unflatten(-1, (-1, DIM)).transpose(1, 2).split((HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1), 1)
        q, k, v, indexer_q, indexer_k = parts
        i = torch.arange(x.shape[1])
        top = self.scores(indexer_q, indexer_k, i).topk(TOP_K, -1)
        listed = top.indices.masked_fill(top.values == float("-inf"), LENGTH // BLOCK)
        blocks = torch.zeros(*listed.shape[:-1], LENGTH // BLOCK + 1, dtype=torch.bool).scatter(-1, listed, True)[..., :-1]
        seen = blocks.repeat_interleave(BLOCK, -1).repeat_interleave(GROUP, 1) & (i[:, None] >= i)
        mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def block_maxima(q: Tensor, k: Tensor, i: Tensor, hide: float = float("-inf"), ahead: int = 0, scale: float = 1.0) -> Tensor:
    """The largest causal logit of each block."""
    logits = (scale * (q @ k.transpose(-1, -2))).masked_fill(i > i[:, None] + ahead, hide)
    return logits.unflatten(-1, (-1, BLOCK)).amax(-1)


def scatter_own(scores: Tensor, i: Tensor, before: int = 1) -> Tensor:
    local = (i[:, None] // BLOCK - torch.arange(before)).clamp(min=0)
    return scores.scatter(-1, local.expand(*scores.shape[:2], -1, -1), float("inf"))


INDEXERS: dict[str, Indexer] = {
    "own_block": lambda q, k, i: scatter_own(block_maxima(q, k, i), i),
    "two_local_blocks": lambda q, k, i: scatter_own(block_maxima(q, k, i), i, before=2),
    "einsum_and_scale": lambda q, k, i: (
        (0.25 * torch.einsum("bhid,bgjd->bhij", q, k))
        .where(i[:, None] >= i, float("-inf"))
        .unflatten(-1, (-1, BLOCK))
        .amax(-1)
        .masked_fill(own(i, LENGTH // BLOCK), float("inf"))
    ),
}
INDEXER_SLIPS: dict[str, Indexer] = {
    "sees_the_future": lambda q, k, i: scatter_own((q @ k.mT).unflatten(-1, (-1, BLOCK)).amax(-1), i),
    "one_token_ahead": lambda q, k, i: scatter_own(block_maxima(q, k, i, ahead=1), i),
    "mean_of_block": lambda q, k, i: scatter_own((q @ k.mT).unflatten(-1, (-1, BLOCK)).mean(-1), i),
    "finite_fill": lambda q, k, i: scatter_own(block_maxima(q, k, i, hide=-1.0), i),
    "smallest_logit": lambda q, k, i: scatter_own(-block_maxima(q, k, i, hide=float("inf")), i),
    "negative_scale": lambda q, k, i: scatter_own(block_maxima(q, k, i, scale=-1.0), i),
    "half_blocks": lambda q, k, i: scatter_own(
        (q @ k.mT).masked_fill(i > i[:, None], float("-inf")).unflatten(-1, (-1, BLOCK))[..., : BLOCK // 2].amax(-1), i
    ),
    "heads_swapped": lambda q, k, i: scatter_own(block_maxima(q.flip(1), k, i), i),
    "keys_rolled": lambda q, k, i: scatter_own(block_maxima(q, k.roll(1, 2), i), i),
    "absolute_logits": lambda q, k, i: scatter_own(
        (q @ k.mT).abs().masked_fill(i > i[:, None], float("-inf")).unflatten(-1, (-1, BLOCK)).amax(-1), i
    ),
}
