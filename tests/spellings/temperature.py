"""A learned scale on the logits: one number, one per head, one per query; times it, divided by it, by its exponential."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .spelling import (
    BLOCK,
    GROUP,
    HEADS,
    KV_HEADS,
    QKV,
    SCALE,
    Kind,
    Mutant,
    Spelling,
    choose_blocks,
    flipped,
    from_module,
    interleave,
    keep,
    rolled,
    spell,
    tile,
)

Change = Callable[[Tensor], Tensor]
WINDOW = 16


def selected_mask(q: Tensor, k: Tensor) -> Tensor:
    """(b, hkv, n, n): keys of the chosen blocks that are not in the future."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(*indices.shape[:3], n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    return chosen.repeat_interleave(BLOCK, -1) & torch.ones(n, n, dtype=torch.bool).tril()


class LearnedTemperature(nn.Module):
    """One number for all heads, as a parameter."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.masked_first: bool = changes.get("masked_first", False)
        self.times: Change = changes.get("times", keep)
        self.values: Change = changes.get("values", keep)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = ~selected_mask(q, k).repeat_interleave(GROUP, 1)
        k, v = (interleave(x, GROUP) for x in (k, self.values(v)))
        logits, temperature = q @ k.mT * SCALE, self.times(self.temperature)
        if self.masked_first:
            logits = logits.masked_fill(hidden, -1e9) * temperature
        else:
            logits = (logits * temperature).masked_fill(hidden, -1e9)
        return logits.softmax(-1) @ v


class TemperaturePerHead(nn.Module):
    """The exponential of a parameter (hq, 1, 1) divides; heads are grouped for the product."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.heads: Change = changes.get("heads", keep)
        self.factor: float = changes.get("factor", 1.0)
        self.sees: Callable[[Tensor, Tensor], Tensor] = changes.get("sees", operator.ge)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        visible = self.sees(i, j) & (i - j < WINDOW)
        logits = torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (KV_HEADS, GROUP)), k).flatten(1, 2)
        logits = SCALE * logits / self.heads((self.factor * self.logarithm).exp())
        weights = logits.where(visible, float("-inf")).softmax(-1).unflatten(1, (KV_HEADS, GROUP))
        return torch.einsum("bhgij,bhjd->bhgid", weights, v).flatten(1, 2)


def sharpness_of_the_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharpness: Tensor,
    *,
    of: Change = keep,
    heads: Callable[[Tensor, int], Tensor] = interleave,
    values: Change = keep,
) -> Tensor:
    """Each query and key head has a factor (b, hkv, n, 1) of its own; the mask is added."""
    near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - WINDOW)
    bias = torch.zeros(near.shape).masked_fill(~near, -torch.inf)
    logits = q @ heads(k, GROUP).mT * of(sharpness.sigmoid()).repeat_interleave(GROUP, 1)
    return (logits + bias).softmax(-1) @ heads(values(v), GROUP)


def factor_in_einsum(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, *, axis: str = "i", last: int = 1 - WINDOW) -> Tensor:
    """The factor (hq, n) is a third operand of the contraction."""
    k, v = (interleave(x, GROUP) for x in (k, v))
    logits = torch.einsum(f"bhid,bhjd,h{axis}->bhij", q, k, slope)
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(last)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def turned(x: Tensor) -> Tensor:
    """(..., n, 1) as (..., 1, n): a factor of the key."""
    return x.mT


def negated(x: Tensor) -> Tensor:
    return -x


def next_head(x: Tensor) -> Tensor:
    """(h, 1, 1) with its heads moved by one."""
    return x.roll(1, 0)


SPELLINGS: tuple[Spelling, ...] = (
    Spelling(
        "learned_temperature",
        Kind.S1,
        from_module(LearnedTemperature, QKV),
        ("selected",),
        (
            Mutant("after the mask", {"masked_first": True, "times": negated}, must_refuse=True),
            Mutant("negated", {"times": negated}),
            Mutant("squared", {"times": torch.square}),
            Mutant("flipped values", {"values": flipped}),
        ),
    ),
    Spelling(
        "temperature_per_head",
        Kind.WINDOW,
        from_module(TemperaturePerHead, QKV),
        ("sliding_window",),
        (
            Mutant("of the next head", {"heads": next_head}),
            Mutant("another exponent", {"factor": 0.5}),
            Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
        ),
    ),
    spell(
        sharpness_of_the_query,
        Kind.WINDOW,
        Mutant("sharpness of the key", {"of": turned}, must_refuse=True),
        Mutant("of the next query", {"of": rolled}),
        Mutant("heads tiled", {"heads": tile}),
        Mutant("flipped values", {"values": flipped}),
        role="sliding_window",
        shapes=(*QKV, (*QKV[1][:3], 1)),
    ),
    spell(
        factor_in_einsum,
        Kind.WINDOW,
        Mutant("of the key", {"axis": "j"}, must_refuse=True),
        Mutant("window 17", {"last": -WINDOW}),
        Mutant("window 15", {"last": 2 - WINDOW}),
        role="sliding_window",
        shapes=(*QKV, (HEADS, QKV[0][2])),
    ),
)
