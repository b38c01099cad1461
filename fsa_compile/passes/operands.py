"""The same element at every depth: an operand seen at the nodes that it comes from, so that a cut may be made at any of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from . import expr as x
from .expr import Expr
from .nodes import constant_factor, dtype, holds, is_real, op_name
from .reader import Coords, Mode, Reader
from .rules.index import parts_of


@dataclass(frozen=True)
class Step:
    """One depth of an operand: the same element, seen at an earlier node.

    Attributes:
        node: The node.
        coords: Where the element stands in it.
        guard: When the element comes from here (padding otherwise).
        factor: The constant that multiplies it on the way up.
    """

    node: Node
    coords: Coords
    guard: Expr
    factor: float


def chain(r: Reader, n: Node, coords: Coords) -> list[Step]:
    """The same element at every depth: along single-source moves and constant factors, shallowest first."""
    guard, factor, used = x.TRUE, 1.0, dtype(n)
    out = [Step(n, coords, guard, factor)]
    while True:
        k = constant_factor(n) if is_real(n) else None
        if k is not None:
            source, by = k
            factor *= by
            n, coords = source, r.align(source, coords)
        else:
            step = r.move(n, coords, Mode.OPERAND)
            if step is not None and dtype(n) != used and not holds(dtype(n), dtype(step.source)):
                return out  # rounded to less than it is used in: that rounding must stay
            if step is None:
                return out + _joined(r, n, coords, guard, factor)
            n, coords, guard = step.source, step.coords, x.conj(guard, step.guard)
        out.append(Step(n, coords, guard, factor))


def _joined(r: Reader, n: Node, coords: Coords, guard: Expr, factor: float) -> list[Step]:
    """Below a concatenation whose parts come from one tensor: that tensor, at coordinates that depend on the part.

    A look-back chunk is the previous chunk and this one; parts of zeros are padding.
    """
    if op_name(n) not in ("cat", "concat"):
        return []
    merged: dict[Node, Step] | None = None
    for condition, part, inside in reversed(parts_of(r, n, coords)):
        if r.read(part, inside, Mode.FORMULA) is x.real(0):
            below: dict[Node, Step] = {}
        else:
            below = {s.node: s for s in chain(r, part, inside)}
            if merged is not None and any(merged.values()):
                below = {k: s for k, s in below.items() if k in merged and merged[k].factor == s.factor}
            if not below:
                return []
        merged = _either(condition, below, merged)
    return [Step(s.node, s.coords, x.conj(guard, s.guard), factor * s.factor) for s in (merged or {}).values()]


def _either(condition: Expr, a: dict[Node, Step], b: dict[Node, Step] | None) -> dict[Node, Step]:
    """The steps `a` where the condition holds and `b` otherwise; an empty side is padding."""
    if b is None:
        return a
    if not a:
        return {k: Step(s.node, s.coords, x.conj(x.negate(condition), s.guard), s.factor) for k, s in b.items()}
    if not b:
        return {k: Step(s.node, s.coords, x.conj(condition, s.guard), s.factor) for k, s in a.items()}
    return {
        k: Step(
            s.node,
            tuple(x.select(condition, p, q) for p, q in zip(s.coords, b[k].coords)),
            x.select(condition, s.guard, b[k].guard),
            s.factor,
        )
        for k, s in a.items()
    }
