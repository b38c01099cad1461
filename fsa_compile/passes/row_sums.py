"""What a row of weights made by hand sums up to, and what it gives where no key is seen.

A softmax is never divided by zero; `exp`, a sum and a division may be. Three things decide what happens:

* what the exponents are relative to (`Basis`). If the largest logit of the row is subtracted, the largest weight is 1 and the
  sum is at least 1. If nothing is, a masked weight is 0 whatever finite number masks, and the sum can be anything above 0;
* which keys a mask behind the exponential removes. The largest may be one of these;
* what keeps the divisor from zero (`handmade.Floor`).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..report import ReasonKind
from . import expr as x
from .expr import Expr
from .handmade import EXPONENTIALS, Core, Floor, Guard, core
from .nodes import argument, axis, dtype, is_tensor, op_name, rank
from .reader import SOFTMAXES, Coords, Mode, Reader
from .refusal import Refusal
from .smt import solve
from .temperature import Term, terms

GRADIENT = 1e6
"""Larger than any gradient of an attention output. Divided by a floor it has to be a number still."""


class Basis(enum.Enum):
    """What the weights of a row are relative to."""

    NOTHING = "exponentials of the logits themselves, or of these and a number"
    LARGEST = "the largest weight is one, or all together are"
    OTHER = "run-time values"


@dataclass(frozen=True)
class Weights:
    """The weights of a row before masks behind the exponential.

    Attributes:
        basis: What they are relative to.
        counted: For which keys the logit is not masked before the exponential.
        fills: What the other logits are.
        additive: Whether that is added, so that a gradient flows to them.
    """

    basis: Basis
    counted: Expr
    fills: frozenset[float]
    additive: bool


@dataclass(frozen=True)
class EmptyRow:
    """A row in which no key is visible.

    Attributes:
        fills, additive: As in `AttentionForm`.
        zero: Whether it gives zeros, and zero gradients.
        settled: Whether it is known at all what it gives.
    """

    fills: frozenset[float]
    additive: bool
    zero: bool = False
    settled: bool = True


def empty_row(r: Reader, softmax: Node, coords: Coords, jv: Expr, visible: Expr, before: EmptyRow, threshold: float) -> EmptyRow:
    """What a quotient by hand gives where no key is visible.

    Args:
        r: The reader.
        softmax: The quotient.
        coords: The element of its weights.
        jv: The variable of the key.
        visible: The keys that are seen.
        before: What a softmax of the same logits would give.
        threshold: What masks, if it is a logit.

    Raises:
        Refusal: If a floor may change the sum of a row that sees some key.
    """
    normalised = r.normalised(softmax)
    assert normalised is not None
    floor = normalised.floor
    found = core(r, normalised.weights, coords)
    weights = _weights(r, found, jv, threshold) if found is not None else None
    basis = weights.basis if weights is not None else Basis.OTHER
    if basis is Basis.NOTHING:
        if floor is not None and floor.guard is not Guard.REPLACE:
            raise Refusal(ReasonKind.LOGITS, f"the sum of the weights is {floor}, and may be as small as that: {_ADVICE}")
        if any(fill > threshold for fill in before.fills):
            return before  # a number in whole rows gives them equal weights
        # exp(-1e9) is zero: a finite fill is as good as -inf, and an empty row is 0 / 0.
        before = replace(before, fills=frozenset({-math.inf}) if before.fills else before.fills)
        return before if floor is None else replace(before, zero=True, additive=False)
    if found is None or weights is None or basis is Basis.OTHER:
        if floor is not None:
            text = f"the sum of the weights is {floor}, and nothing is known of how small it is: {_ADVICE}"
            raise Refusal(ReasonKind.LOGITS, text)
        return replace(before, additive=True, settled=before.fills <= {-math.inf})
    nan = -math.inf in weights.fills and op_name(found.node) != "_safe_softmax"
    # The maximum drops out of the gradient. A NaN weight that a mask sets to zero has a NaN gradient, which a sum hands on.
    before = replace(before, additive=weights.additive or found.multiplied and before.additive)
    if floor is None:
        return before
    _inactive(floor, found)
    if not _follows(visible, weights.counted):
        where = "softmax" if op_name(found.node) in SOFTMAXES else "exponential"
        keys = f"keys are masked behind the {where} that are not masked before it"
        raise Refusal(ReasonKind.LOGITS, f"the sum of the weights is {floor}, and may be smaller: {keys}")
    if found.kept is x.TRUE:
        return before  # the weights of an empty row are all one, or NaN: the floor plays no part
    if not _follows(visible, found.kept):
        return replace(before, settled=False)
    if nan and found.multiplied:
        return before
    overflows = found.multiplied and GRADIENT > floor.value * torch.finfo(dtype(softmax)).max
    return replace(before, zero=True, additive=weights.additive and nan or overflows)


_ADVICE = "subtract the largest of the masked logits before the exponential, or use softmax"


def _follows(e: Expr, given: Expr) -> bool:
    return e is given or solve([], x.implies(given, e), 200) is None


def _inactive(floor: Floor, found: Core) -> None:
    """Refuses a floor that changes sums which are at least one, or one up to rounding.

    Raises:
        Refusal: If it does.
    """
    dt = dtype(floor.node)
    if floor.guard is Guard.CLAMP and floor.value > (0.5 if op_name(found.node) in SOFTMAXES else 1.0):
        raise Refusal(ReasonKind.LOGITS, f"the sum of the weights is {floor}, and may be smaller than that")
    if floor.guard is Guard.ADD and floor.value >= torch.finfo(dt).eps / 4:
        most = f"only what is rounded away, less than {torch.finfo(dt).eps / 4:.1e} in {dt}, changes nothing"
        raise Refusal(ReasonKind.LOGITS, f"the sum of the weights is {floor}: {most}")


def _weights(r: Reader, found: Core, jv: Expr, threshold: float) -> Weights | None:
    """The weights of the row of an exponential or a softmax."""
    if op_name(found.node) in SOFTMAXES:
        source, d = r.softmax_axis(found.node)
        if found.coords[d] is not x.poly(jv) or r.shape(source)[d] is not jv.args[1]:
            return Weights(Basis.OTHER, x.TRUE, frozenset(), False)
        return _split(_case_terms(r, r.logit(found.node, found.coords), jv), threshold, Basis.LARGEST)
    assert op_name(found.node) in EXPONENTIALS
    cases = _case_terms(r, r.read(found.node.args[0], found.coords, Mode.FORMULA), jv)
    rows = [[t for t in summands if jv not in t.rest.free and t.rest.op != "const"] for _, summands in cases]
    if not any(rows):
        return _split(cases, threshold, Basis.NOTHING)
    largest = {t for some in rows for t in some if _maximum(r, t) is not None}
    if len(largest) != 1:
        return None
    (peak,) = largest
    without = [(g, [t for t in summands if t != peak]) for g, summands in cases]
    same = all(peak in some for some in rows) and _are(without, _compared(r, peak, jv))
    return _split(without, threshold, Basis.LARGEST if same else Basis.OTHER)


Cases = list[tuple[Expr, list[Term]]]


def _case_terms(r: Reader, e: Expr, jv: Expr) -> Cases:
    return [(g, list(terms(r, leaf, jv))) for g, leaf in x.cases(e)]


def _split(cases: Cases, threshold: float, basis: Basis) -> Weights:
    counted, fills, additive = [], set(), False
    for g, summands in cases:
        shift = sum(_value(t) for t in summands if t.rest.op == "const")
        if shift > threshold:
            counted.append(g)
        else:
            fills.add(shift)
            additive = additive or any(t.rest.op != "const" for t in summands)
    return Weights(basis, x.disj(*counted), frozenset(fills), additive)


def _maximum(r: Reader, t: Term) -> tuple[Node, int, Coords] | None:
    """If a term is a maximum over one axis: of which node and axis, and where the row is."""
    if t.rest.op != "load" or t.factors or t.number >= 0:
        return None
    n, coords = r.nodes[t.rest.args[0]], t.rest.args[1]
    while op_name(n) == "detach" or op_name(n) == "getitem" and n.args[1] == 0:
        n = n.args[0]
    if op_name(n) not in ("amax", "max") or len(n.args) < 2 or not is_tensor(n.args[0]):
        return None
    dims = [n.args[1]] if isinstance(n.args[1], int) else n.args[1]
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:  # max(a, b) is no reduction
        return None
    d = axis(dims[0], rank(n.args[0]))
    return n.args[0], d, (*coords[:d], *coords[d + bool(argument(n, 2, "keepdim", False)) :])


def _compared(r: Reader, peak: Term, jv: Expr) -> Cases | None:
    """What a maximum is taken of, times the factor with which it is subtracted; None if that is not the row of `jv`."""
    found = _maximum(r, peak)
    assert found is not None
    source, d, row = found
    if r.shape(source)[d] is not jv.args[1] or any(jv in c.free for c in row):
        return None
    cases = _case_terms(r, r.read(source, (*row[:d], x.poly(jv), *row[d:]), Mode.FORMULA), jv)
    return [(g, [replace(t, number=-peak.number * t.number) for t in summands]) for g, summands in cases]


def _are(these: Cases, those: Cases | None) -> bool:
    """Whether both are the same sums in the same cases. Numbers that mask may be rounded."""
    if those is None or [g for g, _ in these] != [g for g, _ in those]:
        return False
    return all(
        {t for t in a if t.rest.op != "const"} == {t for t in b if t.rest.op != "const"}
        and math.isclose(*(sum(_value(t) for t in some if t.rest.op == "const") for some in (a, b)), rel_tol=1e-6, abs_tol=0.0)
        for (_, a), (_, b) in zip(these, those)
    )


def _value(t: Term) -> float:
    return t.number * t.rest.args[0]
