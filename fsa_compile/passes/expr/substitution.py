"""Replacing variables, and rebuilding an expression from changed operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .formula import conj, disj, exists, in_range, is_zero, negate, nonnegative, select
from .integer import ONE, as_atom, as_var, floordiv, integer, minus, mod, plus, poly, times
from .node import INT, Expr, make, walk
from .real import compare_reals


def substitute(e: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace free variables (atoms) by integer expressions and normalise again."""
    memo: dict[Expr, Expr] = {}

    def go(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(go(y) for y in x)
        if not isinstance(x, Expr) or not (x.free & mapping.keys()):
            return x
        r = memo.get(x)
        if r is None:
            r = memo[x] = mapping[x] if x.op == "var" else rebuild(x, go)
        return r

    return go(e)


def rebuild(e: Expr, f: Callable[[Any], Any]) -> Expr:
    """`e` with `f` applied to its operands; atoms of sums may become polynomials."""
    op, a = e.op, e.args
    if op == "sum":
        out = integer(a[0])
        for t, k in a[1]:
            r = f(t)
            out = plus(out, times(r if r.op == "sum" else poly(r), k))
        return out
    if op == "prod":
        out = ONE
        for t in a[0]:
            r = f(t)
            out = times(out, r if r.op == "sum" else poly(r))
        return out
    if op == "exists":
        return exists(poly(a[0]), f(a[1]))
    new = tuple(f(x) for x in a)
    if op == "div":
        return floordiv(*new)
    if op == "mod":
        return mod(*new)
    if op == "apply":
        return poly(make(op, new, INT, e.lo, e.hi))
    if op == "if_int":
        r = select(*new)
        atom = as_atom(r)
        if atom is not None and atom.op == "if_int":  # a clamp knows tighter bounds than its branches
            return poly(make("if_int", atom.args, INT, max(atom.lo, e.lo), min(atom.hi, e.hi)))
        return r
    if op == "if_real":
        return select(*new)
    if op == "not":
        return negate(*new)
    if op == "and":
        return conj(*new)
    if op == "or":
        return disj(*new)
    if op == "ge":
        return nonnegative(*new)
    if op == "eq":
        return is_zero(*new)
    if op == "compare":
        return compare_reals(*new)
    return make(op, new, e.sort, e.lo, e.hi)


def root(equation: Expr, v: Expr | None) -> Expr | None:
    """The only value of the variable `v` that solves an "eq", if `v` is in it once and has the factor 1 or -1."""
    total = equation.args[0]
    moving = [(t, k) for t, k in total.args[1] if v in t.free]
    if v is None or len(moving) != 1 or moving[0][0] is not v or abs(moving[0][1]) != 1:
        return None
    k = moving[0][1]
    return times(minus(total, times(poly(v), k)), -k)


def _between(conditions: tuple[Expr, ...], v: Expr) -> Iterator[Expr]:
    """The only value of `v` within two bounds: ``k * v <= e < k * v + k`` is ``v == e // k``."""
    bounds = []
    for c in conditions:
        moving = [(t, k) for t, k in c.args[0].args[1] if v in t.free] if c.op == "ge" else []
        if len(moving) == 1 and moving[0][0] is v:
            k = moving[0][1]
            bounds.append((k, minus(c.args[0], times(poly(v), k))))
    for up, above in bounds:
        for down, below in bounds:
            if up < 0 < down and floordiv(above, -up) is floordiv(plus(times(below, -1), down - 1), down):
                yield floordiv(above, -up)


def one_point(v: Expr, body: Expr) -> Expr | None:
    """``exists v: body`` without the quantifier, where the body says which `v` that is: ``v == e and rest(v)`` is ``rest(e)``,
    if `e` lies within the range of `v`. None if it does not say."""
    bound = as_var(v)
    assert bound is not None, v
    conditions = body.args if body.op == "and" else (body,)
    found = [e for c in conditions if c.op == "eq" and (e := root(c, bound)) is not None] + list(_between(conditions, bound))
    quantified = {t.args[0] for t in walk(body) if t.op == "exists"}
    for e in sorted(found, key=lambda e: any(t.op == "apply" for t in walk(e))):
        if not e.free & quantified:
            return conj(in_range(e, bound.args[1]), substitute(body, {bound: e}))
    return None


def some(v: Expr, body: Expr) -> Expr:
    """``exists v: body``, without a quantifier for the parts that say which `v`."""
    if body.op == "or":
        return disj(*(some(v, part) for part in body.args))
    known = one_point(v, body)
    return exists(v, body) if known is None else known
