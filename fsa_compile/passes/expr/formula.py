"""Formulas over comparisons of integers, opaque predicates and ``exists``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .integer import ONE, ZERO, as_var, integer, minus, plus, poly, times, upper, weighted_sum
from .node import BOOL, INT, REAL, Expr, make

TRUE = make("true", (), BOOL)
FALSE = make("false", (), BOOL)


def boolean(b: bool) -> Expr:
    return TRUE if b else FALSE


def negate(a: Expr) -> Expr:
    if a is TRUE:
        return FALSE
    if a is FALSE:
        return TRUE
    if a.op == "not":
        return a.args[0]
    if a.op == "ge":
        return nonnegative(minus(integer(-1), a.args[0]))
    return make("not", (a,), BOOL)


def _flat(op: str, xs: Iterable[Expr], absorb: Expr, drop: Expr) -> list[Expr] | None:
    out: dict[Expr, None] = {}
    for x in xs:
        for y in x.args if x.op == op else (x,):
            if y is absorb or negate(y) in out:
                return None
            if y is not drop:
                out[y] = None
    return sorted(out, key=lambda e: e.id)


def conj(*xs: Expr) -> Expr:
    """Conjunction."""
    parts = _flat("and", xs, FALSE, TRUE)
    if parts is None:
        return FALSE
    return TRUE if not parts else parts[0] if len(parts) == 1 else make("and", tuple(parts), BOOL)


def disj(*xs: Expr) -> Expr:
    """Disjunction."""
    parts = _flat("or", xs, TRUE, FALSE)
    if parts is None:
        return TRUE
    return FALSE if not parts else parts[0] if len(parts) == 1 else make("or", tuple(parts), BOOL)


def implies(a: Expr, b: Expr) -> Expr:
    return disj(negate(a), b)


def iff(a: Expr, b: Expr) -> Expr:
    return conj(implies(a, b), implies(b, a))


def _by_condition(x: Expr, f: Callable[[Expr], Expr]) -> Expr | None:
    """A comparison `f` of a polynomial with one conditional atom, taken into its branches if one of them settles it."""
    conditional = [(a, k) for a, k in x.args[1] if a.op == "if_int"]
    if len(conditional) != 1:
        return None
    ((atom, k),) = conditional
    rest = minus(x, times(poly(atom), k))
    yes, no = (f(plus(rest, times(branch, k))) for branch in atom.args[1:])
    return select(atom.args[0], yes, no) if {yes, no} & {TRUE, FALSE} else None


def nonnegative(x: Expr) -> Expr:
    if x.lo >= 0:
        return TRUE
    if x.hi < 0:
        return FALSE
    if any(a.op == "size" for a, _ in x.args[1]):  # symbolic sizes may still cancel: s - 1 - j with j < s
        top, bottom = upper(x), upper(times(x, -1))
        if bottom is not None and bottom.hi <= 0:
            return TRUE
        if top is not None and top.hi < 0:
            return FALSE
    inside = _by_condition(x, nonnegative)
    if inside is not None:
        return inside
    g = math.gcd(*(k for _, k in x.args[1]))
    if g > 1:
        x = weighted_sum(x.args[0] // g, tuple((a, k // g) for a, k in x.args[1]))
    return make("ge", (x,), BOOL)


def is_zero(x: Expr) -> Expr:
    if x.lo > 0 or x.hi < 0:
        return FALSE
    if x.lo == 0 == x.hi:
        return TRUE
    inside = _by_condition(x, is_zero)
    if inside is not None:
        return inside
    g = math.gcd(*(k for _, k in x.args[1]))
    if x.args[0] % g:
        return FALSE
    if x.args[1][0][1] < 0:
        x = times(x, -1)
    return make("eq", (x,), BOOL)


def at_least(a: Expr, b: Expr) -> Expr:
    """``a >= b``."""
    return nonnegative(minus(a, b))


def less(a: Expr, b: Expr) -> Expr:
    """``a < b``."""
    return negate(at_least(a, b))


def equal(a: Expr, b: Expr) -> Expr:
    """``a == b``."""
    return is_zero(minus(a, b))


def in_range(x: Expr, size: Expr) -> Expr:
    """``0 <= x < size``."""
    return conj(at_least(x, ZERO), less(x, size))


def predicate(name: str, args: Iterable[Expr]) -> Expr:
    """An opaque truth: element `args` of the boolean tensor `name`."""
    return make("predicate", (name, tuple(args)), BOOL)


def exists(v: Expr, body: Expr) -> Expr:
    """``exists v: body``; conjuncts free of `v` move out, disjunctions split."""
    if body.op == "or":
        return disj(*(exists(v, x) for x in body.args))
    bound = as_var(v)
    assert bound is not None, v
    if body.op == "and":
        outer = [x for x in body.args if bound not in x.free]
        if outer:
            return conj(*outer, exists(v, conj(*(x for x in body.args if bound in x.free))))
    size = bound.args[1]
    if size.hi <= 0:
        return FALSE
    if bound not in body.free:
        return conj(at_least(size, ONE), body)
    return make("exists", (bound, body), BOOL)


def select(c: Expr, a: Expr, b: Expr) -> Expr:
    """``a if c else b``, of any sort."""
    if c is TRUE:
        return a
    if c is FALSE:
        return b
    if a is b:
        return a
    if a.sort == BOOL:
        return disj(conj(c, a), conj(negate(c), b))
    if a.sort == INT:
        return poly(make("if_int", (c, a, b), INT, min(a.lo, b.lo), max(a.hi, b.hi)))
    if b.op == "if_real" and b.args[0] is c:
        b = b.args[2]
    if a.op == "if_real" and a.args[0] is c:
        a = a.args[1]
    return make("if_real", (c, a, b), REAL)




def clamp(x: Expr, lo: int | None, hi: int | None) -> Expr:
    """``min(max(x, lo), hi)``, with the bounds known to the result."""
    if lo is not None and x.lo < lo:
        x = poly(make("if_int", (at_least(x, integer(lo)), x, integer(lo)), INT, lo, max(x.hi, lo)))
    if hi is not None and x.hi > hi:
        x = poly(make("if_int", (at_least(integer(hi), x), x, integer(hi)), INT, min(x.lo, hi), hi))
    return x
