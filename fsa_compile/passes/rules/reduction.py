"""Values: reductions over one axis, as far as masks and scores need them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from .. import expr as x
from ..expr import Expr
from ..nodes import argument, axis, dtype, is_int, is_real, op_name, rank
from ..reader import Coords, Mode, Reader, values
from .contraction import sum_of_products


def reduced_axis(n: Node, position: int = 1) -> int | None:
    """The only axis that a reduction runs over, or None if there is not exactly one."""
    dims = argument(n, position, "dim")
    if isinstance(dims, int):
        dims = [dims]
    if not dims:  # all axes
        return 0 if rank(n.args[0]) == 1 else None
    return axis(dims[0], rank(n.args[0])) if len(dims) == 1 else None


def inside(r: Reader, n: Node, c: Coords, d: int, keepdim: bool, tag: str) -> tuple[Expr, Coords]:
    """A fresh variable over axis `d` of the source, and the coordinates of the source with it."""
    v = x.var(f"{n.name}.{tag}", r.shape(n.args[0])[d])
    return v, c[:d] + (v,) + c[d + 1 :] if keepdim else c[:d] + (v,) + c[d:]


@values("any")
def _any(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    d = reduced_axis(n)
    if d is None:
        return None
    v, q = inside(r, n, c, d, argument(n, 2, "keepdim", False), "any")
    return x.some(v, x.truth(r.read(n.args[0], q, Mode.VALUE)))


@values("all")
def _all(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    d = reduced_axis(n)
    if d is None:
        return None
    v, q = inside(r, n, c, d, argument(n, 2, "keepdim", False), "all")
    return x.negate(x.some(v, x.negate(x.truth(r.read(n.args[0], q, Mode.VALUE)))))


@values("sum", "count_nonzero")
def _sum(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """A count of truths: zero iff none holds, at least one otherwise, how many is not needed. Of products: a contraction."""
    d = reduced_axis(n)
    if is_real(n):
        if m is Mode.VALUE and d is not None:
            return _count(r, n, c, d)
        return sum_of_products(r, n, c, m) if m in (Mode.FORMULA, Mode.SCORE) and op_name(n) == "sum" else None
    if d is None or dtype(n) not in (torch.int32, torch.int64):  # a count in 8 bits wraps
        return None
    v, q = inside(r, n, c, d, argument(n, 2, "keepdim", False), "sum")
    summand = r.read(n.args[0], q, Mode.VALUE)
    hit = _nonzero(summand)
    most = r.shape(n.args[0])[d].hi * (summand.hi if summand.sort == x.INT else 1)
    return None if hit is None else x.select(x.some(v, hit), x.apply(n.name, c, 1, max(most, 1)), x.ZERO)


def _count(r: Reader, n: Node, c: Coords, d: int) -> Expr | None:
    """A sum of zeros and ones in floating point."""
    v, q = inside(r, n, c, d, argument(n, 2, "keepdim", False), "sum")
    ones = _where_one(r.read(n.args[0], q, Mode.VALUE))
    most = r.shape(n.args[0])[d].hi
    if ones is None or most * torch.finfo(dtype(n)).eps > 1:
        return None
    return x.select(x.some(v, ones), x.from_int(x.apply(n.name, c, 1, most)), x.real(0))


def _where_one(e: Expr) -> Expr | None:
    """When a number that is always zero or one is one."""
    leaves = list(x.cases(e)) if e.sort == x.REAL else []
    if leaves and all(t in (x.real(0), x.real(1)) for _, t in leaves):
        return x.disj(*(g for g, t in leaves if t is x.real(1)))
    return x.equal(e, x.ONE) if e.sort == x.INT and 0 <= e.lo and e.hi <= 1 else None


def _nonzero(e: Expr) -> Expr | None:
    """When a non-negative summand is positive."""
    if e.sort == x.BOOL:
        return e
    return x.truth(e) if e.sort == x.INT and e.lo >= 0 else None


@values("amax")
def _amax(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return largest(r, n, c, m, n)


def largest(r: Reader, n: Node, c: Coords, m: Mode, result: Node) -> Expr | None:
    """Element `c` of the values of the maximum `n`, which the node `result` holds. Of zeros and ones: one where there is one. Of data where a mask lets any through:
    -inf where it lets none."""
    d = reduced_axis(n)
    if d is None:
        return None
    v, q = inside(r, n, c, d, argument(n, 2, "keepdim", False), "max")
    found = r.read(n.args[0], q, Mode.VALUE)
    ones = _where_one(found)
    if ones is not None:
        some = x.some(v, ones)
        return x.select(some, x.ONE, x.ZERO) if found.sort == x.INT else x.select(some, x.real(1), x.real(0))
    # In the logits a row maximum only shifts the row; its cases matter where scores are compared.
    leaves = list(x.cases(found)) if found.sort == x.REAL and m is Mode.VALUE else []
    constants = {e.args[0] for _, e in leaves if e.op == "const"}
    if constants != {-math.inf}:
        return None
    some = x.some(v, x.disj(*(g for g, e in leaves if e.op != "const")))
    return x.select(some, r.leaf(result, c), x.real(-math.inf))


@values("mean")
def _mean(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Conditions that are free of the averaged axis pass through; a constant is its own mean, up to rounding."""
    d = reduced_axis(n)
    if d is None or not is_real(n):
        return None
    v, q = inside(r, n, c, d, argument(n, 2, "keepdim", False), "mean")
    length = x.constant(r.shape(n.args[0])[d])
    if m is Mode.SCORE and length:
        return x.scaled(r.contraction([v], [(n.args[0], q, r.read(n.args[0], q, m))]), 1 / length)
    huge = torch.finfo(dtype(n)).max / r.shape(n.args[0])[d].hi
    return _through(r.read(n.args[0], q, m), x.as_var(v), lambda: r.leaf(n, c), huge)


def _through(e: Expr, v: Expr | None, leaf: Callable[[], Expr], huge: float) -> Expr:
    if e.op == "if_real" and v not in e.args[0].free:
        return x.select(e.args[0], _through(e.args[1], v, leaf, huge), _through(e.args[2], v, leaf, huge))
    if e.op != "const":
        return leaf()
    value = e.args[0]
    if value == 0 or math.isinf(value):
        return e
    if abs(value) < huge:
        return x.opaque("about", e)
    return x.opaque("at_most", e) if value < 0 else leaf()  # the sum may overflow to -inf


@values("cumsum")
def _cumsum(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Of a constant: a ramp. Of a single one: a step."""
    d = axis(n.args[1], rank(n))
    v = x.var(f"{n.name}.cumsum", r.shape(n)[d])
    e = r.coerce(n, r.read(n.args[0], c[:d] + (v,) + c[d + 1 :], m))
    case = (x.as_atom(e) or e) if e.sort == x.INT else e
    if case.op in ("if_int", "if_real") and case.args[0].op == "eq":
        where, one, zero = x.root(case.args[0], x.as_var(v)), *case.args[1:]
        if where is not None and one in (x.ONE, x.real(1)) and zero in (x.ZERO, x.real(0)):
            return x.select(x.conj(x.at_least(where, x.ZERO), x.at_least(c[d], where)), one, zero)
    k = x.constant(e) if is_int(n) else None
    return x.times(x.plus(c[d], 1), k) if k is not None else None


@values("diff")
def _diff(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if not is_int(n) or argument(n, 1, "n", 1) != 1 or argument(n, 4, "append") is not None:
        return None
    source, d, before = n.args[0], axis(argument(n, 2, "dim", -1), rank(n)), argument(n, 3, "prepend")

    def at(node: Node, e: Expr) -> Expr:
        return r.read(node, c[:d] + (e,) + c[d + 1 :], m)

    if before is None:
        return x.minus(at(source, x.plus(c[d], 1)), at(source, c[d]))
    if r.shape(before)[d] is not x.ONE:
        return None
    first = x.equal(c[d], x.ZERO)
    return x.select(
        first,
        x.minus(at(source, x.ZERO), at(before, x.ZERO)),
        x.minus(at(source, c[d]), at(source, x.minus(c[d], 1))),
    )
