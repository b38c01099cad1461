"""What is called sparse attention, or looks like it, and is another function: S3, S8 and S9 must stay the user's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fsa_compile.report import ReasonKind

from .spelling import BLOCK, GROUP, HEADS, QKV, SCALE, TOP_K, Kind, Problem, choose_blocks, interleave, randoms

INF = float("inf")


@dataclass(frozen=True)
class LookAlike:
    """A function in which nothing may be rewritten.

    Args:
        body: Function of random tensors.
        kind: Its class.
        shapes: Of its inputs.
        reasons: The kinds of reason that tell the user the truth about it; empty where several would.
    """

    body: Callable[..., Tensor]
    kind: Kind
    shapes: tuple[tuple[int, ...], ...] = QKV
    reasons: frozenset[ReasonKind] = frozenset()

    @property
    def name(self) -> str:
        """Name of the body."""
        return self.body.__name__

    def make(self, seed: int) -> Problem:
        """The function and its inputs (float32 leaves that need grad)."""
        return self.body, randoms(torch.Generator().manual_seed(seed), self.shapes)


def mean_query_gathers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean query selects blocks for all queries; full attention over the gathered keys."""
    b, hkv, n, d = k.shape
    scores = q.unflatten(1, (hkv, GROUP)).mean((2, 3)).unsqueeze(2) @ k.unflatten(2, (-1, BLOCK)).mean(3).mT
    indices = scores.squeeze(2).topk(TOP_K, dim=-1).indices[..., None, None].expand(-1, -1, -1, BLOCK, d)
    keys = k.unflatten(2, (-1, BLOCK)).gather(2, indices).flatten(2, 3)
    vals = v.unflatten(2, (-1, BLOCK)).gather(2, indices).flatten(2, 3)
    logits = q @ interleave(keys, GROUP).mT * SCALE
    return logits.softmax(-1) @ interleave(vals, GROUP)


def last_query_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query selects tokens' blocks for all queries; only a key axis in the mask, nothing causal."""
    n = k.shape[2]
    scores = q[:, :, -1:] @ interleave(k, GROUP).unflatten(2, (-1, BLOCK)).mean(3).mT
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(TOP_K).indices, True)
    logits = q @ interleave(k, GROUP).mT * SCALE
    logits = logits.masked_fill(~chosen.repeat_interleave(BLOCK, -1).expand(-1, -1, n, -1), -INF)
    return logits.softmax(-1) @ interleave(v, GROUP)


def token_top_k_mask(q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor) -> Tensor:
    """An indexer scores single tokens; its top tokens become a mask over (n, m)."""
    n = k.shape[2]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = (F.relu(torch.einsum("bhid,bjd->bhij", index_q, index_k))).sum(1).masked_fill(future, -INF)
    bias = torch.full((q.shape[0], n, n), -INF).scatter(-1, scores.topk(16).indices, 0.0).masked_fill(future, -INF)
    logits = q @ interleave(k, GROUP).mT * SCALE + bias[:, None]
    return logits.softmax(-1) @ interleave(v, GROUP)


def token_top_k_gather(q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor) -> Tensor:
    """The same, with the keys of the top tokens gathered."""
    b, hkv, n, d = k.shape
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = (F.relu(torch.einsum("bhid,bjd->bhij", index_q, index_k))).sum(1).masked_fill(future, -INF)
    tokens = scores.topk(16).indices
    batch = torch.arange(b)[:, None, None]
    keys, vals = k.transpose(1, 2)[batch, tokens], v.transpose(1, 2)[batch, tokens]
    logits = torch.einsum("bhgid,bithd->bhgit", q.unflatten(1, (hkv, GROUP)), keys) * SCALE
    logits = logits.masked_fill((tokens > torch.arange(n)[:, None])[:, None, None], -INF)
    return torch.einsum("bhgit,bithd->bhgid", logits.softmax(-1), vals).flatten(1, 2)


def static_selection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every fourth block and the own one: a fixed pattern, no selection by data."""
    n = k.shape[2]
    block = torch.arange(n) // BLOCK
    visible = ((block % 4 == 0)[None, :] | (block[:, None] == block[None, :])) & torch.ones(n, n, dtype=torch.bool).tril()
    logits = (q @ interleave(k, GROUP).mT * SCALE).masked_fill(~visible, -INF)
    return logits.softmax(-1) @ interleave(v, GROUP)


def hashed_selection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys see each other where their positions hash to one bucket."""
    n = k.shape[2]
    bucket = torch.arange(n) * 7 % 5
    visible = (bucket[:, None] == bucket[None, :]) & torch.ones(n, n, dtype=torch.bool).tril()
    logits = (q @ interleave(k, GROUP).mT * SCALE).masked_fill(~visible, -INF)
    return logits.softmax(-1) @ interleave(v, GROUP)


def window_of_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ "Selected := window": the own and the two previous blocks, a window whose width varies with the row."""
    n = k.shape[2]
    block = torch.arange(n) // BLOCK
    apart = block[:, None] - block[None, :]
    visible = (apart < TOP_K) & torch.ones(n, n, dtype=torch.bool).tril()
    logits = (q @ interleave(k, GROUP).mT * SCALE).masked_fill(~visible, -INF)
    return logits.softmax(-1) @ interleave(v, GROUP)


def one_softmax_for_two_branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Window keys and compressed keys share one softmax."""
    n = k.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near = (j <= i) & (i - j < 16)
    far = i >= (torch.arange(n // BLOCK) + 1) * BLOCK
    keys = torch.cat((k, k.unflatten(2, (-1, BLOCK)).mean(3)), dim=2)
    vals = torch.cat((v, v.unflatten(2, (-1, BLOCK)).mean(3)), dim=2)
    logits = q @ interleave(keys, GROUP).mT * SCALE
    logits = logits.masked_fill(~torch.cat((near, far), dim=1), -INF)
    return logits.softmax(-1) @ interleave(vals, GROUP)


def window_with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """A learned logit per head takes part in the softmax and is dropped before the values."""
    n = k.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    logits = (q @ interleave(k, GROUP).mT * SCALE).masked_fill((j > i) | (i - j >= 16), -INF)
    logits = torch.cat((sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1), logits), dim=-1)
    return logits.softmax(-1)[..., 1:] @ interleave(v, GROUP)


def gather_along_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks are repeated for every query and gathered along the axis of the copies: whatever is picked, the first come out."""
    n, d = k.shape[2:]
    indices = choose_blocks(q, k)[..., None, None].expand(-1, -1, -1, -1, BLOCK, d)
    keys, vals = (t.unflatten(2, (-1, BLOCK))[:, :, None].expand(-1, -1, n, -1, -1, -1) for t in (k, v))
    keys, vals = (t.gather(2, indices).flatten(3, 4) for t in (keys, vals))
    logits = torch.einsum("bhgid,bhijd->bhgij", q.unflatten(1, (-1, GROUP)), keys) * SCALE
    return torch.einsum("bhgij,bhijd->bhgid", logits.softmax(-1), vals).flatten(1, 2)


INDEXER = (*QKV, (QKV[0][0], 2, QKV[0][2], 8), (QKV[0][0], QKV[0][2], 8))

LOOKALIKES = (
    LookAlike(mean_query_gathers, Kind.S3),
    LookAlike(last_query_masks, Kind.S3),
    LookAlike(token_top_k_mask, Kind.S8, INDEXER, frozenset({ReasonKind.TOKEN_LEVEL})),
    LookAlike(token_top_k_gather, Kind.S8, INDEXER, frozenset({ReasonKind.TOKEN_LEVEL})),
    LookAlike(static_selection, Kind.S9, reasons=frozenset({ReasonKind.MASK})),
    LookAlike(hashed_selection, Kind.S9, reasons=frozenset({ReasonKind.MASK})),
    LookAlike(window_of_blocks, Kind.S9, reasons=frozenset({ReasonKind.MASK})),
    LookAlike(gather_along_copies, Kind.S9, reasons=frozenset({ReasonKind.MASK, ReasonKind.OPERANDS})),
    LookAlike(one_softmax_for_two_branches, Kind.S9),
    LookAlike(window_with_sink, Kind.S9, (*QKV, (HEADS,))),
)
