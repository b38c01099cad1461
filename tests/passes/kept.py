"""Models that keep a mask: in a buffer, read when compiling (`test_buffers`) and changed later (`test_buffer_changes`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .end_to_end import BLOCK, DIM, HEADS, KV_HEADS, LENGTH, OPTIONS, TOP_K, WINDOW, Outcome, band, qkv

SCALE = DIM**-0.5
INF = float("inf")
CAPACITY = 64
"""Buffers are longer than the sequences: models slice them."""
MATTERS = 1e-3
"""A mutant's eager output differs from its parent's by at least this."""

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Kept(nn.Module):
    """A module that keeps one tensor and attends with it."""

    def __init__(self, mask: Tensor, attend: Attend) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(self, q, k, v)


def filled(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(~m.mask[:n, :n], -INF).softmax(-1) @ v


def excluded(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(m.mask[..., :n, :n] != 0, torch.finfo(q.dtype).min).softmax(-1) @ v


def added(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE + m.mask[:n, :n]).softmax(-1) @ v


def fused(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask[:n, :n])


def distances(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    d = m.mask[:n, :n]
    return (q @ k.mT * SCALE).masked_fill((d < 0) | (d >= WINDOW), -INF).softmax(-1) @ v


def positions(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = m.mask[: q.shape[2]]
    d = p[:, None] - p
    return (q @ k.mT * SCALE).masked_fill((d < 0) | (d >= WINDOW), -INF).softmax(-1) @ v


def compressed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Block means behind a learned token; `mask` says which blocks are complete ``(n, blocks)``."""
    n = q.shape[2]
    k, v = (F.pad(t.unflatten(2, (-1, BLOCK)).mean(3), (0, 0, 1, 0), value=0.5) for t in (k, v))
    complete = F.pad(m.mask[:n, : n // BLOCK], (1, 0), value=True)
    return (q @ k.mT * SCALE).masked_fill(~complete, -INF).softmax(-1) @ v


def compressed_ends(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same; `mask` is the table of the blocks' last keys."""
    n = q.shape[2]
    k, v = (F.pad(t.unflatten(2, (-1, BLOCK)).mean(3), (0, 0, 1, 0), value=0.5) for t in (k, v))
    complete = F.pad(m.mask[: n // BLOCK] <= torch.arange(n)[:, None], (1, 0), value=True)
    return (q @ k.mT * SCALE).masked_fill(~complete, -INF).softmax(-1) @ v


def choose(q: Tensor, k: Tensor) -> Tensor:
    """Blocks per query ``(b, hkv, n, TOP_K)``, the own one always."""
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    s = q.unflatten(1, (KV_HEADS, -1)).mean(2) @ pooled.mT
    own, blocks = torch.arange(q.shape[2])[:, None] // BLOCK, torch.arange(pooled.shape[2])
    return s.masked_fill(blocks > own, -INF).masked_fill(blocks == own, INF).topk(TOP_K, -1).indices


def chosen(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(*q.shape[:1], KV_HEADS, q.shape[2], q.shape[2] // BLOCK, dtype=torch.bool).scatter(-1, choose(q, k), True)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v, mask = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v, mask))
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v


def selected(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`mask` is the triangle."""
    n = q.shape[2]
    return grouped(q, k, v, chosen(q, k).repeat_interleave(BLOCK, -1) & m.mask[:n, :n])


def selected_by_map(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`mask` is the map from positions to blocks."""
    i = torch.arange(q.shape[2])
    return grouped(q, k, v, chosen(q, k)[..., m.mask[: len(i)]] & (i <= i[:, None]))


@dataclass(frozen=True)
class Spelling:
    """A way to keep a mask.

    Attributes:
        attend: The code.
        mask: The value.
        role: What it is rewritten to.
        mutants: By name: what is done to the value.
    """

    attend: Attend
    mask: Tensor
    role: str
    mutants: dict[str, Callable[[Tensor], Tensor]]


def flipped(t: Tensor) -> Tensor:
    t = t.clone()
    t[..., 20, 17] = ~t[..., 20, 17] if t.dtype == torch.bool else (1 - t[..., 20, 17])
    return t


def plus_one_at(k: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        return t + (torch.arange(len(t)) == k)

    return change


def rolled(t: Tensor) -> Tensor:
    """Query 0 keeps its own key: NaN on both sides would prove nothing."""
    t = t.roll(1, 0)
    t[0] = t[1]
    return t


I, J = torch.arange(CAPACITY)[:, None], torch.arange(CAPACITY)
BLOCKS = torch.arange(CAPACITY // BLOCK)
BAND = band(CAPACITY)
COMPLETE = (BLOCKS + 1) * BLOCK - 1 <= I
ZERO_OR_INF = torch.zeros(CAPACITY, CAPACITY).masked_fill(~BAND, -INF)
KV = {compressed: HEADS, compressed_ends: HEADS, selected: KV_HEADS, selected_by_map: KV_HEADS}

WIDER = {"one key wider": lambda t: band(CAPACITY, WINDOW + 1), "a flipped bit": flipped, "rolled": rolled}
SPELLINGS: dict[str, Spelling] = {
    "band": Spelling(filled, BAND, "sliding_window", WIDER),
    "band, True where masked": Spelling(
        excluded, ~BAND, "sliding_window", {k: lambda t, f=f: ~f(~t) for k, f in WIDER.items()}
    ),
    "band of bytes, with batch and head": Spelling(
        excluded, (~BAND).to(torch.uint8)[None, None], "sliding_window", {"a flipped bit": flipped}
    ),
    "band to add": Spelling(
        added, ZERO_OR_INF, "sliding_window",
        {"a flipped bit": lambda t: torch.zeros_like(t).masked_fill(~flipped(t == 0), -INF), "a bias": lambda t: t + J % 3},
    ),
    "band for sdpa": Spelling(fused, BAND, "sliding_window", WIDER),
    "distances": Spelling(distances, I - J, "sliding_window", {"one too far": lambda t: t - 1, "rolled": rolled}),
    "positions": Spelling(positions, J.clone(), "sliding_window", {"one moved": plus_one_at(9), "doubled": lambda t: 2 * t}),
    "positions of float32": Spelling(positions, J.float(), "sliding_window", {"by halves": lambda t: t / 2}),
    "complete blocks": Spelling(
        compressed, COMPLETE, "compressed", {"one token later": lambda t: rolled(t), "a flipped bit": lambda t: _flip_last(t)}
    ),
    "ends of blocks": Spelling(
        compressed_ends, (BLOCKS + 1) * BLOCK - 1, "compressed", {"one end moved": plus_one_at(2), "begin": lambda t: t - 1}
    ),
    "triangle of a selection": Spelling(
        selected, J <= I, "selected", {"the future": lambda t: J < I + 2, "a flipped bit": lambda t: t & ~((I == 21) & (J == 20))}
    ),
    "map to blocks": Spelling(
        selected_by_map, J // BLOCK, "selected", {"one key in the next block": plus_one_at(7), "swapped": lambda t: t ^ 1}
    ),
}  # fmt: skip


def _flip_last(t: Tensor) -> Tensor:
    t = t.clone()
    t[20, 1] = False
    return t


def inputs_for(attend: Attend, n: int = LENGTH) -> tuple[Tensor, ...]:
    return qkv(n, kv_heads=KV.get(attend, HEADS))


def compiled(module: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(module, backend="fsa", fullgraph=True, options={**OPTIONS, **options})


def largest_difference(a: Outcome, b: Outcome) -> float:
    return max(float((p - r).abs().nan_to_num(INF).max()) for p, r in zip(a.outputs, b.outputs))


class Checkpointed(Kept):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(super().forward, q, k, v, use_reentrant=False)
