"""Probabilities as the exponential of normalised logits: `log_softmax(x).exp()` and `(x - logsumexp(x)).exp()`."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .spelling import BLOCK, GROUP, SCALE, Kind, Mutant, choose_blocks, flipped, keep, rolled, spell

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def masked_logits(q: Tensor, k: Tensor, sees: Comparison, fill: float) -> Tensor:
    """(b, hq, n, n) logits of the chosen blocks."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(*indices.shape[:-1], n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    i = torch.arange(n)
    visible = (chosen[..., i // BLOCK] & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    return (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, fill)


def log_softmax_exp(
    q: Tensor, k: Tensor, v: Tensor, *, axis: int = -1, sees: Comparison = operator.ge, values: Change = keep, base: float = 1.0
) -> Tensor:
    """`log_softmax(x, -1).exp()`; `base` is what multiplies the logarithms."""
    logarithms = masked_logits(q, k, sees, float("-inf")).log_softmax(axis)
    weights = logarithms.exp() if base == 1.0 else (logarithms * base).exp()
    return weights @ values(v).repeat_interleave(GROUP, 1)


def minus_logsumexp(
    q: Tensor, k: Tensor, v: Tensor, *, axis: int = -1, sees: Comparison = operator.ge, inner: Change = keep, values: Change = keep
) -> Tensor:
    """`(x - logsumexp(x)).exp()` with a finite fill."""
    logits = masked_logits(q, k, sees, torch.finfo(q.dtype).min)
    total = logits.logsumexp(axis, keepdim=True) if inner is keep else inner(logits).logsumexp(axis, keepdim=True)
    return (logits - total).exp() @ values(v).repeat_interleave(GROUP, 1)


def logsumexp_unsqueezed(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: float = 1.0, sees: Comparison = operator.ge, restored: int = -1
) -> Tensor:
    """The axis of the sum is dropped and put back."""
    logits = masked_logits(q, k, sees, float("-inf"))
    total = torch.logsumexp(logits, -1).unsqueeze(restored)
    weights = torch.exp(logits - total if alpha == 1.0 else torch.sub(logits, total, alpha=alpha))
    return weights @ v.repeat_interleave(GROUP, 1)


def halved(x: Tensor) -> Tensor:
    """(..., n) at half the temperature."""
    return x * 0.5


STRICT = {"sees": operator.gt}

SPELLINGS = (
    spell(
        log_softmax_exp,
        Kind.S1,
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
        Mutant("sharpened", {"base": 1.5}, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        minus_logsumexp,
        Kind.S1,
        Mutant("sums over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
        Mutant("the sum of other logits", {"inner": halved}, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
    ),
    spell(
        logsumexp_unsqueezed,
        Kind.S1,
        Mutant("half of the sum", {"alpha": 0.5}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
        Mutant("put back at the queries", {"restored": -2}, must_refuse=True),
    ),
)
