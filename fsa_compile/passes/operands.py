"""The same element at every depth: an operand seen at the nodes that it comes from, so that a cut may be made at any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from . import expr as x
from .expr import Expr
from .nodes import argument, axis, constant_factor, dtype, holds, is_real, op_name, rank
from .reader import Coords, Mode, Reader
from .rules.index import at, nonempty, parts_of


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
                below = _in_series(r, n, coords) or _joined(r, n, coords)
                return out + [Step(s.node, s.coords, x.conj(guard, s.guard), factor * s.factor) for s in below]
            n, coords, guard = step.source, step.coords, x.conj(guard, step.guard)
        out.append(Step(n, coords, guard, factor))


def _joined(r: Reader, n: Node, coords: Coords) -> list[Step]:
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
    return list((merged or {}).values())


SERIES = 3
"""So many parts, each one step after the last, are read as a function of their number."""


def _in_series(r: Reader, n: Node, coords: Coords) -> list[Step]:
    """Below a stack or a concatenation of equal parts of one tensor that are evenly shifted: ``stack([pad(k, b)[:n] for b in
    range(w)])`` is k at ``i - b``."""
    if op_name(n) not in ("stack", "cat", "concat"):
        return []
    d = axis(argument(n, 1, "dim", 0), rank(n))
    if op_name(n) == "stack":
        parts, extent, inside = list(n.args[0]), x.ONE, coords[:d] + coords[d + 1 :]
    else:
        parts = nonempty(r, n.args[0])
        if not parts:
            return []
        extent = r.shape(parts[0])[d]
        inside = at(coords, d, x.var(f"{n.name}.within", extent) if extent is not x.ONE else x.ZERO)
    size = x.constant(extent)
    if len(parts) < SERIES or size is None or op_name(n) != "stack" and any(r.shape(t)[d] is not extent for t in parts):
        return []
    number = x.var(f"{n.name}.part", x.integer(len(parts)))
    here = {x.as_var(number): x.floordiv(coords[d], size)}
    if size > 1:
        here[x.as_var(inside[d])] = x.mod(coords[d], size)
    out = []
    below = [{s.node: s for s in chain(r, t, inside)} for t in parts]
    for node, first in below[0].items():
        steps = [found[node] for found in below if node in found]
        if len(steps) < len(parts) or any(s.factor != first.factor for s in steps):
            continue
        lines = [_line(terms, number) for terms in zip(*((*s.coords, s.guard) for s in steps))]
        if None not in lines:
            *place, guard = (x.substitute(e, here) for e in lines)  # type: ignore[arg-type]
            out.append(Step(node, tuple(place), guard, first.factor))
    return out


def _line(terms: Sequence[Expr], number: Expr) -> Expr | None:
    """The expression that is ``terms[k]`` where `number` is k, if they differ by multiples of k alone."""
    v = x.as_var(number)
    for k in (len(terms) - 2, 0):  # a condition may always hold at one end
        e = _between(terms[k], terms[k + 1], x.minus(number, k))
        if e is not None and all(x.substitute(e, {v: x.integer(p)}) is t for p, t in enumerate(terms)):
            return e
    return None


def _between(a: Expr, b: Expr, k: Expr) -> Expr | None:
    """An expression that is `a` for k = 0 and `b` for k = 1."""
    if a is b:
        return a
    step = x.constant(x.minus(b, a)) if a.sort == b.sort == x.INT else None
    if step is not None:
        return x.plus(a, x.times(k, step))
    pairs = list(zip(x.children(a), x.children(b)))
    if a.op != b.op or a.op not in ("ge", "and", "or", "not") or len(x.children(a)) != len(x.children(b)):
        return None
    inner = {p: _between(p, q, k) for p, q in pairs}
    return None if None in inner.values() else x.rebuild(a, inner.__getitem__)


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
