"""Softmaxes by hand as kernels and older code write them: powers of two, a floor under the sum, an inverse, a norm, probabilities
that are masked and normalised again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import BLOCK, GROUP, SCALE, Kind, Mutant, choose_blocks, flipped, keep, rolled, spell

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]
INF = float("inf")
LOG2E = math.log2(math.e)


def logits_and_mask(q: Tensor, k: Tensor, sees: Comparison, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """(b, hq, n, n) logits, and what the chosen blocks let through."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(*indices.shape[:-1], n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    i = torch.arange(n)
    visible = (chosen[..., i // BLOCK] & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    return q @ k.repeat_interleave(GROUP, 1).mT * scale, visible


def powers_of_two(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    factor: float = LOG2E,
    axis: int = -1,
    sees: Comparison = operator.ge,
    values: Change = keep,
) -> Tensor:
    """`exp2` with log2(e) behind the maximum, as in kernels."""
    logits, visible = logits_and_mask(q, k, sees)
    logits = logits.masked_fill(~visible, -INF)
    weights = torch.exp2((logits - logits.amax(-1, keepdim=True)) * factor)
    return weights / weights.sum(axis, keepdim=True) @ values(v).repeat_interleave(GROUP, 1)


def scale_in_base_two(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = SCALE * LOG2E, fill: float = -1e9, sees: Comparison = operator.ge
) -> Tensor:
    """log2(e) folded into the scale, so that the maximum and a finite fill are in base two; division after the product."""
    logits, visible = logits_and_mask(q, k, sees, scale)
    logits = logits.masked_fill(~visible, fill)
    weights = torch.exp2(logits - logits.max(-1, keepdim=True).values)
    return weights @ v.repeat_interleave(GROUP, 1) / weights.sum(-1, keepdim=True)


def special_softmax(
    q: Tensor, k: Tensor, v: Tensor, *, axis: int = -1, sees: Comparison = operator.ge, values: Change = keep
) -> Tensor:
    """`torch.special.softmax`."""
    logits, visible = logits_and_mask(q, k, sees)
    return torch.special.softmax(logits.masked_fill(~visible, -INF), axis) @ values(v).repeat_interleave(GROUP, 1)


def softmin_of_distances(
    q: Tensor, k: Tensor, v: Tensor, *, sign: float = -1.0, axis: int = -1, sees: Comparison = operator.ge
) -> Tensor:
    """`softmin` of negative logits."""
    logits, visible = logits_and_mask(q, k, sees)
    return F.softmin((sign * logits).masked_fill(~visible, INF), axis) @ v.repeat_interleave(GROUP, 1)


def clamped_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-9,
    peak: Change = keep,
    sees: Comparison = operator.ge,
    hidden: Change = keep,
) -> Tensor:
    """Weights masked before and behind `exp`; their sum, at least one where a key is seen, clamped at 1e-9."""
    logits, visible = logits_and_mask(q, k, sees)
    logits = logits.masked_fill(~visible, -1e9)
    weights = (logits - peak(logits).amax(-1, keepdim=True).detach()).exp() * hidden(visible)
    return weights / weights.sum(-1, keepdim=True).clamp_min(eps) @ v.repeat_interleave(GROUP, 1)


def sum_plus_epsilon(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-12, sees: Comparison = operator.ge, values: Change = keep
) -> Tensor:
    """`+ 1e-12`, which float32 rounds away beside a sum of one or more; an inverse instead of a division."""
    logits, visible = logits_and_mask(q, k, sees)
    logits = torch.where(visible, logits, torch.finfo(q.dtype).min)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights * (1.0 / (weights.sum(-1, keepdim=True) + eps)) @ values(v).repeat_interleave(GROUP, 1)


def normalised_by_norm(
    q: Tensor, k: Tensor, v: Tensor, *, p: float = 1.0, axis: int = -1, sees: Comparison = operator.ge, values: Change = keep
) -> Tensor:
    """`F.normalize(e, p=1)`, which clamps the norm at 1e-12."""
    logits, visible = logits_and_mask(q, k, sees)
    logits = logits.masked_fill(~visible, -INF)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return F.normalize(weights, p=p, dim=axis) @ values(v).repeat_interleave(GROUP, 1)


def zero_sums_replaced(
    q: Tensor, k: Tensor, v: Tensor, *, other: float = 0.0, axis: int = -1, sees: Comparison = operator.ge
) -> Tensor:
    """No maximum, weights zeroed behind `exp`, and a divisor that is never zero. `other` is the weight of masked keys."""
    logits, visible = logits_and_mask(q, k, sees)
    weights = torch.where(visible, logits.exp(), other)
    total = weights.sum(axis, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v.repeat_interleave(GROUP, 1)


def masked_probabilities(
    q: Tensor, k: Tensor, v: Tensor, *, power: float = 1.0, axis: int = -1, sees: Comparison = operator.ge, values: Change = keep
) -> Tensor:
    """A softmax over all keys, masked, and divided by what is left of it."""
    logits, visible = logits_and_mask(q, k, sees)
    p = logits.softmax(-1) * visible
    return (p if power == 1.0 else p**power) / p.sum(axis, keepdim=True) @ values(v).repeat_interleave(GROUP, 1)


def masked_twice_and_clamped(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6, before: Comparison = operator.ge, sees: Comparison = operator.ge
) -> Tensor:
    """The same mask before and behind the softmax, and the sum, which is one, clamped."""
    logits, visible = logits_and_mask(q, k, sees)
    n = k.shape[2]
    inner = visible & before(torch.arange(n)[:, None], torch.arange(n))
    p = logits.masked_fill(~inner, -1e9).softmax(-1).masked_fill(~visible, 0.0)
    return p / p.sum(-1, keepdim=True).clamp(min=eps) @ v.repeat_interleave(GROUP, 1)


STRICT = {"sees": operator.gt}

SPELLINGS = (
    spell(
        powers_of_two,
        Kind.S1,
        Mutant("two to the logits", {"factor": 1.0}),
        Mutant("sums over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT),
        Mutant("rolled values", {"values": rolled}),
    ),
    spell(
        scale_in_base_two,
        Kind.S1,
        Mutant("without log2(e)", {"scale": SCALE}),
        Mutant("fill leaks probability", {"fill": -4.0}, must_refuse=True),
        Mutant("strict causality", STRICT),
    ),
    spell(
        special_softmax,
        Kind.S1,
        Mutant("softmax over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        softmin_of_distances,
        Kind.S1,
        Mutant("softmin of the logits", {"sign": 1.0}),
        Mutant("over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
    ),
    spell(
        clamped_sum,
        Kind.S1,
        Mutant("clamped at two", {"eps": 2.0}, must_refuse=True),
        Mutant("another maximum", {"peak": lambda y: y + 25.0}, must_refuse=True),
        Mutant("masked by other keys", {"hidden": flipped}, must_refuse=True),
        Mutant("strict causality", STRICT),
    ),
    spell(
        sum_plus_epsilon,
        Kind.S1,
        Mutant("plus a half", {"eps": 0.5}, must_refuse=True),
        Mutant("strict causality", STRICT),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        normalised_by_norm,
        Kind.S1,
        Mutant("euclidean norm", {"p": 2.0}, must_refuse=True),
        Mutant("over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT, must_refuse=True),
        Mutant("rolled values", {"values": rolled}),
    ),
    spell(
        zero_sums_replaced,
        Kind.S1,
        Mutant("masked keys keep a weight", {"other": 0.1}, must_refuse=True),
        Mutant("sums over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT),
    ),
    spell(
        masked_probabilities,
        Kind.S1,
        Mutant("sharpened", {"power": 2.0}, must_refuse=True),
        Mutant("sums over queries", {"axis": -2}, must_refuse=True),
        Mutant("strict causality", STRICT),
        Mutant("flipped values", {"values": flipped}),
    ),
    spell(
        masked_twice_and_clamped,
        Kind.S1,
        Mutant("clamped at two", {"eps": 2.0}, must_refuse=True),
        Mutant("another mask before", {"before": operator.gt}),
        Mutant("strict causality", STRICT),
    ),
)
