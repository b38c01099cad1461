"""Reals: case trees over formulas, with leaves constant, load, dot product, softmax, scaled and sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from .formula import FALSE, TRUE, at_least, boolean, conj, disj, equal, is_zero, less, negate, select
from .integer import as_atom, constant, integer, plus, times
from .node import BOOL, INF, INT, REAL, Expr, make


def real(c: float) -> Expr:
    """The constant `c`."""
    return make("const", (float(c),), REAL)


def constant_real(e: Expr) -> float | None:
    """The value of a constant real or integer, or None."""
    return e.args[0] if e.op == "const" else constant(e) if e.sort == INT else None


def load(name: str, coords: Iterable[Expr]) -> Expr:
    """Element `coords` of the real tensor `name`."""
    return make("load", (name, tuple(coords)), REAL)


def from_int(e: Expr) -> Expr:
    """An integer as a real."""
    c = constant(e)
    if c is not None:
        return real(c)
    a = as_atom(e)
    if a is not None and a.op == "if_int":
        return select(a.args[0], from_int(a.args[1]), from_int(a.args[2]))
    if e.op == "sum" and len(e.args[1]) == 1 and e.args[1][0][0].op == "if_int":
        ((case, factor),) = e.args[1]
        return select(case.args[0], *(from_int(plus(times(part, factor), e.args[0])) for part in case.args[1:]))
    return make("float", (e,), REAL)


def softmax(name: str, coords: Iterable[Expr]) -> Expr:
    """Element `coords` of the probabilities computed by node `name`."""
    return make("softmax", (name, tuple(coords)), REAL)


def dot(variables: Iterable[Expr], factors: Iterable[Expr]) -> Expr:
    """``sum over variables of the product of the factors``."""
    return make("dot", (tuple(variables), tuple(factors)), REAL)


def opaque(name: str, *factors: Expr) -> Expr:
    """A real function of reals without further meaning."""
    return make("opaque", (name, tuple(factors)), REAL)


def zero_times(e: Expr) -> Expr | None:
    """What a leaf is zero times of (NaN where that is NaN or infinite), or None."""
    return e.args[1][1] if e.op == "opaque" and e.args[0] == "mul" and e.args[1][0] is real(0) else None


def scaled(e: Expr, k: float) -> Expr:
    """``k * e``, pushed to the leaves of the case tree."""

    def leaf(x: Expr) -> Expr:
        if k == 1:
            return x
        if x.op == "const":
            return real(x.args[0] * k)
        if x.op == "float" and k == int(k):
            return make("float", (times(x.args[0], int(k)),), REAL)
        if x.op == "scaled":
            return make("scaled", (x.args[0] * k, x.args[1]), REAL)
        return make("scaled", (float(k), x), REAL)

    return map_cases(e, leaf)


def add_reals(a: Expr, b: Expr) -> Expr:
    """``a + b``, pushed to the leaves of both case trees."""

    def leaf(x: Expr, y: Expr) -> Expr:
        if x.op == y.op == "const":
            return real(x.args[0] + y.args[0])
        if x.op == y.op == "float":
            return make("float", (plus(x.args[0], y.args[0]),), REAL)
        if y.op == "const":
            x, y = y, x
        if x.op == "const":
            c = x.args[0]
            if c == 0:
                return y
            if y.op == "float" and math.isfinite(c) and c == int(c):
                return make("float", (plus(y.args[0], int(c)),), REAL)
        return make("add", (x, y), REAL)

    return map_cases(a, lambda x: map_cases(b, lambda y: leaf(x, y)))


def add_to_infinity(e: Expr) -> Expr:
    """``e + -inf``, kept as a sum: the value is -inf, but a gradient flows to `e`."""
    return map_cases(e, lambda t: t if t.op == "const" and t.args[0] == -INF else make("add", (real(-INF), t), REAL))


def compare_reals(op: str, a: Expr, b: Expr) -> Expr:
    """``a op b`` with op one of "eq", "gt", "ge", pushed to the leaves of both case trees."""

    def leaf(x: Expr, y: Expr) -> Expr:
        x, y = _value(x), _value(y)
        if any(t.op == "const" and math.isnan(t.args[0]) for t in (x, y)):
            return FALSE
        if x.op == y.op == "const":
            u, v = x.args[0], y.args[0]
            return boolean({"eq": u == v, "gt": u > v, "ge": u >= v}[op])
        p, q = _exact_int(x), _exact_int(y)
        if p is not None and q is not None:
            return compare_ints(op, p, q)
        return make("compare", (op, x, y), BOOL)

    return map_truth(a, lambda x: map_truth(b, lambda y: leaf(x, y)))


def is_infinite(e: Expr) -> bool:
    """Whether a leaf is an infinity, or one with a datum added to it."""
    v = _value(e)
    return v.op == "const" and math.isinf(v.args[0])


def _value(e: Expr) -> Expr:
    """An infinity plus a datum is that infinity, where only the value counts."""
    infinite = [t for t in (e.args if e.op == "add" else ()) if t.op == "const" and math.isinf(t.args[0])]
    return infinite[0] if len(infinite) == 1 else e


def compare_ints(op: str, a: Expr, b: Expr) -> Expr:
    return {"eq": equal, "ge": at_least, "gt": lambda p, q: less(q, p)}[op](a, b)


def _exact_int(x: Expr) -> Expr | None:
    if x.op == "float":
        return x.args[0]
    if x.op == "const" and math.isfinite(x.args[0]) and x.args[0] == int(x.args[0]):
        return integer(int(x.args[0]))
    return None


def map_cases(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Apply `f` to every leaf of a case tree."""
    if e.op == "if_real":
        return select(e.args[0], map_cases(e.args[1], f), map_cases(e.args[2], f))
    return f(e)


def map_truth(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Apply the truth-valued `f` to every leaf of a case tree."""
    if e.op == "if_real":
        c = e.args[0]
        return disj(conj(c, map_truth(e.args[1], f)), conj(negate(c), map_truth(e.args[2], f)))
    return f(e)


def cases(e: Expr, given: Expr = TRUE) -> Iterator[tuple[Expr, Expr]]:
    """The leaves of a case tree, each with the condition under which it holds."""
    if e.op == "if_real":
        yield from cases(e.args[1], conj(given, e.args[0]))
        yield from cases(e.args[2], conj(given, negate(e.args[0])))
    elif given is not FALSE:
        yield given, e


def truth(e: Expr) -> Expr:
    """Python's ``bool`` of an expression of any sort."""
    if e.sort == BOOL:
        return e
    if e.sort == INT:
        a = as_atom(e)
        if a is not None and a.op == "if_int":
            return select(a.args[0], truth(a.args[1]), truth(a.args[2]))
        return negate(is_zero(e))
    return negate(compare_reals("eq", e, real(0)))
