"""Replacing variables, and rebuilding an expression from changed operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .formula import conj, disj, exists, is_zero, negate, nonnegative, select
from .integer import ONE, as_atom, floordiv, integer, mod, plus, poly, times
from .node import INT, Expr, make
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
