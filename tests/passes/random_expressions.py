"""Random expressions for hypothesis, each beside the plain Python function that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from fsa_compile.passes import expr as x
from fsa_compile.passes.evaluate import at_point
from fsa_compile.passes.expr import Expr

Point = dict[str, int]

SIZES = {"i": 6, "j": 8, "k": 5}
I, J, K = (x.var(name, size) for name, size in SIZES.items())
S, T = x.size_symbol("s", 2, 9), x.size_symbol("t", 1, math.inf)
N = x.var("n", S)
VARIABLES = {"i": I, "j": J, "k": K, "n": N}


@dataclass(frozen=True)
class Twin:
    """An expression and the Python function that it stands for."""

    e: Expr
    f: Callable[[Point], int | bool]


def value(e: Expr, p: Point) -> int | bool:
    atoms = {x.as_var(v): p[name] for name, v in VARIABLES.items()}
    return at_point(e, atoms, p)  # type: ignore[arg-type]


@st.composite
def points(draw: st.DrawFn) -> Point:
    p = {name: draw(st.integers(0, size - 1)) for name, size in SIZES.items()}
    p["s"] = draw(st.integers(2, 9))
    p["t"] = draw(st.integers(1, 12))
    p["n"] = draw(st.integers(0, p["s"] - 1))
    return p


def _leaf(name: str) -> Twin:
    return Twin({**VARIABLES, "s": S, "t": T}[name], lambda p: p[name])


constants = st.integers(-9, 9).map(lambda c: Twin(x.integer(c), lambda p: c))
static_leaves = st.sampled_from(sorted(SIZES)).map(_leaf) | constants
leaves = st.sampled_from(sorted({**VARIABLES, "s": S, "t": T})).map(_leaf) | constants
static_divisors = st.integers(1, 12).map(lambda c: Twin(x.integer(c), lambda p: c))
divisors = st.one_of(
    static_divisors,
    st.sampled_from(
        [Twin(S, lambda p: p["s"]), Twin(x.times(S, 3), lambda p: 3 * p["s"]), Twin(x.times(S, T), lambda p: p["s"] * p["t"])]
    ),
)


def integers_over(inner: st.SearchStrategy[Twin], divisors: st.SearchStrategy[Twin]) -> st.SearchStrategy[Twin]:
    """One more operation on integers."""

    def pair(build: Callable[[Expr, Expr], Expr], f: Callable[[int, int], int]) -> st.SearchStrategy[Twin]:
        return st.tuples(inner, inner).map(lambda ab: Twin(build(ab[0].e, ab[1].e), lambda p: f(ab[0].f(p), ab[1].f(p))))

    def divide(build: Callable[[Expr, Expr], Expr], f: Callable[[int, int], int]) -> st.SearchStrategy[Twin]:
        return st.tuples(inner, divisors).map(lambda ab: Twin(build(ab[0].e, ab[1].e), lambda p: f(ab[0].f(p), ab[1].f(p))))

    return st.one_of(
        pair(x.plus, lambda a, b: a + b),
        pair(x.minus, lambda a, b: a - b),
        pair(x.times, lambda a, b: a * b),
        divide(x.floordiv, lambda a, b: a // b),
        divide(x.mod, lambda a, b: a % b),
        st.tuples(inner, st.integers(-5, 5)).map(lambda ac: Twin(x.times(ac[0].e, ac[1]), lambda p: ac[0].f(p) * ac[1])),
        st.tuples(inner, st.integers(-5, 5), st.integers(0, 6)).map(
            lambda a: Twin(x.clamp(a[0].e, a[1], a[1] + a[2]), lambda p: min(max(a[0].f(p), a[1]), a[1] + a[2]))
        ),
        st.tuples(inner, inner, inner).map(
            lambda a: Twin(
                x.select(x.at_least(a[0].e, x.ZERO), a[1].e, a[2].e), lambda p: a[1].f(p) if a[0].f(p) >= 0 else a[2].f(p)
            )
        ),
    )


def compare(a: Twin, b: Twin, op: str) -> Twin:
    return {
        "ge": Twin(x.at_least(a.e, b.e), lambda p: a.f(p) >= b.f(p)),
        "lt": Twin(x.less(a.e, b.e), lambda p: a.f(p) < b.f(p)),
        "eq": Twin(x.equal(a.e, b.e), lambda p: a.f(p) == b.f(p)),
        "gt": Twin(x.compare_ints("gt", a.e, b.e), lambda p: a.f(p) > b.f(p)),
        "in": Twin(x.in_range(a.e, b.e), lambda p: 0 <= a.f(p) < b.f(p)),
    }[op]


def comparisons_of(integers: st.SearchStrategy[Twin]) -> st.SearchStrategy[Twin]:
    return st.builds(compare, integers, integers, st.sampled_from(["ge", "lt", "eq", "gt", "in"]))


def formulas_over(inner: st.SearchStrategy[Twin]) -> st.SearchStrategy[Twin]:
    def pair(build: Callable[[Expr, Expr], Expr], f: Callable[[bool, bool], bool]) -> st.SearchStrategy[Twin]:
        return st.tuples(inner, inner).map(
            lambda ab: Twin(build(ab[0].e, ab[1].e), lambda p: f(bool(ab[0].f(p)), bool(ab[1].f(p))))
        )

    return st.one_of(
        inner.map(lambda a: Twin(x.negate(a.e), lambda p: not a.f(p))),
        pair(x.conj, lambda a, b: a and b),
        pair(x.disj, lambda a, b: a or b),
        pair(x.implies, lambda a, b: not a or b),
        pair(x.iff, lambda a, b: a == b),
        st.tuples(inner, inner, inner).map(
            lambda a: Twin(x.select(a[0].e, a[1].e, a[2].e), lambda p: a[1].f(p) if a[0].f(p) else a[2].f(p))
        ),
    )


integers = st.recursive(leaves, lambda inner: integers_over(inner, divisors), max_leaves=7)
formulas = st.recursive(comparisons_of(integers), formulas_over, max_leaves=5)
static_integers = st.recursive(static_leaves, lambda inner: integers_over(inner, static_divisors), max_leaves=5)
static_formulas = st.recursive(comparisons_of(static_integers), formulas_over, max_leaves=3)
"""Over i, j, k alone, whose 240 points can all be tried."""
