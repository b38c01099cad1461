"""The expression language: its normal form never changes a value, and equal things become the same object.

Each random expression is built twice, as an `Expr` and as a plain Python function, and compared at random points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_compile.passes import expr as x
from fsa_compile.passes.evaluate import DataDependent, at_point
from fsa_compile.passes.expr import Expr
from fsa_compile.passes.reader import Reader  # the tables first: rule modules register themselves
from fsa_compile.passes.rules.index import regroup, unflatten

from .random_expressions import SIZES, VARIABLES, I, J, K, N, Point, S, T, Twin, divisors, formulas, integers, points, value

quick = settings(max_examples=120, deadline=None, derandomize=True)


# ------------------------------------------------------------------------------------------- values


@quick
@given(integers, points())
def test_normal_form_keeps_the_value_of_integers(t: Twin, p: Point) -> None:
    assert value(t.e, p) == t.f(p), t.e


@quick
@given(formulas, points())
def test_normal_form_keeps_the_value_of_formulas(t: Twin, p: Point) -> None:
    assert value(t.e, p) == t.f(p), t.e


@quick
@given(integers, points())
def test_bounds_contain_the_value(t: Twin, p: Point) -> None:
    assert t.e.lo <= t.f(p) <= t.e.hi, (t.e, t.e.lo, t.e.hi)


@quick
@given(integers, points())
def test_symbolic_upper_bound_is_one(t: Twin, p: Point) -> None:
    top = x.upper(t.e)
    assert top is None or value(top, p) >= t.f(p), (t.e, top)


@quick
@given(integers, divisors, points())
def test_within_is_sound(t: Twin, c: Twin, p: Point) -> None:
    assert not x.within(t.e, c.e) or 0 <= t.f(p) < c.f(p), (t.e, c.e)


@quick
@given(integers, divisors, points())
def test_quotient_and_remainder_make_the_number_again(t: Twin, c: Twin, p: Point) -> None:
    q, r = x.floordiv(t.e, c.e), x.mod(t.e, c.e)
    assert value(q, p) * c.f(p) + value(r, p) == t.f(p)
    assert 0 <= value(r, p) < c.f(p)


@quick
@given(formulas | integers, st.sampled_from(sorted(VARIABLES)), integers, points())
def test_substitution_commutes_with_evaluation(t: Twin, name: str, by: Twin, p: Point) -> None:
    """At points where what is put in is a value that the variable may have: bounds were used to simplify."""
    size = p["s"] if name == "n" else SIZES[name]
    inside = int(by.f(p)) % size
    replacement = x.mod(by.e, S if name == "n" else size)
    got = x.substitute(t.e, {x.as_var(VARIABLES[name]): replacement})  # type: ignore[dict-item]
    assert value(got, p) == t.f({**p, name: inside}), (t.e, replacement)


@quick
@given(formulas)
def test_negation_is_an_involution(t: Twin) -> None:
    assert x.negate(x.negate(t.e)) is t.e


@quick
@given(formulas)
def test_simplest_laws_hold_in_form(t: Twin) -> None:
    assert x.conj(t.e, t.e) is t.e is x.disj(t.e, t.e)
    assert x.conj(t.e, x.TRUE) is t.e is x.disj(t.e, x.FALSE)
    assert x.conj(t.e, x.FALSE) is x.FALSE and x.disj(t.e, x.TRUE) is x.TRUE
    if t.e.op not in ("and", "or", "not"):  # flattened into their surroundings, compounds are not told from their parts
        assert x.conj(t.e, x.negate(t.e)) is x.FALSE and x.disj(t.e, x.negate(t.e)) is x.TRUE
        assert x.iff(t.e, t.e) is x.TRUE is x.implies(t.e, t.e)


@quick
@given(formulas, formulas)
def test_connectives_do_not_depend_on_order(a: Twin, b: Twin) -> None:
    assert x.conj(a.e, b.e) is x.conj(b.e, a.e)
    assert x.disj(a.e, b.e) is x.disj(b.e, a.e)


@quick
@given(integers, integers)
def test_sums_and_products_do_not_depend_on_order(a: Twin, b: Twin) -> None:
    assert x.plus(a.e, b.e) is x.plus(b.e, a.e)
    assert x.times(a.e, b.e) is x.times(b.e, a.e)
    assert x.minus(x.plus(a.e, b.e), b.e) is a.e


def test_comparisons_with_nan_are_false() -> None:
    """As an infinity and its opposite give it, so that no solver sees it."""
    nan, datum = x.add_reals(x.real(math.inf), x.real(-math.inf)), x.load("t", (x.ZERO,))
    for op in ("eq", "gt", "ge"):
        for a, b in ((nan, datum), (datum, nan), (nan, nan), (nan, x.real(0))):
            assert x.compare_reals(op, a, b) is x.FALSE


@quick
@given(st.sampled_from(["i", "j", "k"]), formulas, points())
def test_exists_is_what_trying_every_value_says(name: str, t: Twin, p: Point) -> None:
    e = x.exists(VARIABLES[name], t.e)
    want = any(t.f({**p, name: v}) for v in range(SIZES[name]))
    assert _with_exists(e, p) == want, e


def _with_exists(e: Expr, p: Point) -> bool:
    """`value`, for formulas that still hold an `exists`."""
    if e.op == "exists":
        v, body = e.args
        return any(_with_exists(body, {**p, v.args[0]: k}) for k in range(SIZES[v.args[0]]))
    if e.op == "not":
        return not _with_exists(e.args[0], p)
    if e.op in ("and", "or"):
        return (all if e.op == "and" else any)(_with_exists(a, p) for a in e.args)
    return bool(value(e, p))


def test_exists_over_nothing_is_false() -> None:
    empty = x.var("empty", 0)
    assert x.exists(empty, x.TRUE) is x.FALSE
    assert x.exists(empty, x.equal(I, x.ONE)) is x.FALSE


def test_exists_over_what_may_be_empty_is_kept() -> None:
    """A body without the variable says nothing about whether there is a value to try."""
    slot = x.var("slot", x.minus(S, 2))
    e = x.exists(slot, x.equal(I, x.ONE))
    assert e.op == "exists" or x.FALSE in x.children(e) or e.op == "and"
    assert e is not x.equal(I, x.ONE)


@quick
@given(integers, formulas, points())
def test_truth_is_pythons(a: Twin, c: Twin, p: Point) -> None:
    assert value(x.truth(a.e), p) == bool(a.f(p))
    chosen = x.truth(x.select(c.e, a.e, x.ZERO))
    assert value(chosen, p) == bool(a.f(p) if c.f(p) else 0)


# ------------------------------------------------------------------------------------------- reshapes


class _Sizes(Reader):
    """What `regroup` needs of a reader: a hint for each size."""

    def __init__(self, hints: Point) -> None:
        self.hints = hints
        self.sizes = self  # type: ignore[assignment]

    def hint(self, e: Expr) -> int:
        return int(at_point(e, {}, self.hints))


def coordinates(shape: Sequence[Expr]) -> tuple[Expr, ...]:
    return tuple(x.var(f"c{k}", s) if s is not x.ONE else x.ZERO for k, s in enumerate(shape))


def constants(*shape: int) -> tuple[Expr, ...]:
    return tuple(map(x.integer, shape))


@st.composite
def two_shapes(draw: st.DrawFn) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """Two shapes with the same number of elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=6))

    def grouped() -> tuple[Expr, ...]:
        out = [1]
        for f in draw(st.permutations(primes)):
            if draw(st.booleans()):
                out.append(f)
            else:
                out[-1] *= f
        return constants(*out)

    return grouped(), grouped()


@quick
@given(two_shapes())
def test_reshape_there_and_back_is_the_identity(shapes: tuple[tuple[Expr, ...], tuple[Expr, ...]]) -> None:
    a, b = shapes
    r, c = _Sizes({}), coordinates(a)
    assert all(p is q for p, q in zip(regroup(r, b, regroup(r, a, c, b), a), c))


@pytest.mark.parametrize(
    "a, b",
    [
        ((S, x.integer(8)), (x.times(S, 8),)),
        ((x.integer(3), S, T), (x.times(S, 3), T)),
        ((x.times(S, 4), T), (S, x.integer(4), x.ONE, T)),
        ((x.times(x.times(S, T), 2),), (T, x.integer(2), S)),
        ((x.integer(2), S, x.integer(4)), (x.times(S, 8),)),
    ],
)
def test_reshape_of_symbolic_sizes_is_inverted(a: tuple[Expr, ...], b: tuple[Expr, ...]) -> None:
    r, c = _Sizes({"s": 7, "t": 5}), coordinates(a)
    there = regroup(r, a, c, b)
    assert all(p is q for p, q in zip(regroup(r, b, there, a), c))


@quick
@given(two_shapes(), st.data())
def test_reshape_is_row_major(shapes: tuple[tuple[Expr, ...], tuple[Expr, ...]], data: st.DataObject) -> None:
    a, b = ([x.constant(s) or 0 for s in shape] for shape in shapes)
    point = [data.draw(st.integers(0, s - 1)) for s in a]
    flat = 0
    for s, p in zip(a, point):
        flat = flat * s + p
    want = []
    for s in reversed(b):
        flat, digit = divmod(flat, s)
        want.append(digit)
    got = regroup(_Sizes({}), shapes[0], constants(*point), shapes[1])
    assert [x.constant(e) for e in got] == want[::-1]


@pytest.mark.parametrize("shape", list(itertools.product([1, 2, 3], repeat=3)), ids=str)
def test_unflatten_of_a_number(shape: tuple[int, ...]) -> None:
    for flat in range(math.prod(shape)):
        got = [x.constant(e) or 0 for e in unflatten(x.integer(flat), constants(*shape))]
        assert sum(g * math.prod(shape[k + 1 :]) for k, g in enumerate(got)) == flat


# ------------------------------------------------------------------------------------------- normal form


def test_mixed_radix_digits_cancel() -> None:
    slot, offset = x.var("slot", 4), x.var("offset", 16)
    flat = x.plus(x.times(slot, 16), offset)
    assert x.floordiv(flat, 16) is slot and x.mod(flat, 16) is offset
    assert x.floordiv(x.plus(flat, 32), 16) is x.plus(slot, 2)
    assert x.mod(x.times(flat, 64), 64) is x.ZERO


def test_symbolic_mixed_radix_digits_cancel() -> None:
    row, column = x.var("row", T), x.var("column", S)
    flat = x.plus(x.times(row, S), column)
    assert x.floordiv(flat, S) is row and x.mod(flat, S) is column
    assert x.plus(x.times(x.floordiv(x.plus(flat, I), S), S), x.mod(x.plus(flat, I), S)) is x.plus(flat, I)


def test_nested_quotients_are_one() -> None:
    wide = x.var("wide", 1000)
    assert x.floordiv(x.floordiv(wide, 4), 6) is x.floordiv(wide, 24)
    assert x.mod(x.mod(wide, 24), 6) is x.mod(wide, 6)


def test_range_of_a_symbolic_variable_is_known() -> None:
    assert x.less(N, S) is x.TRUE
    assert x.at_least(N, x.ZERO) is x.TRUE
    assert x.less(S, N) is x.FALSE
    assert x.less(N, x.minus(S, 1)) not in (x.TRUE, x.FALSE)


def test_equal_expressions_are_one_object_and_different_ranges_are_not() -> None:
    assert x.var("p", 4) is x.var("p", 4)
    assert x.var("p", 4) is not x.var("p", 5)
    assert x.plus(I, J) is x.plus(J, I)
    assert x.load("t", (I, J)) is not x.load("t", (J, I))
    assert x.real(1.0) is x.real(1) and x.real(0.0) is not x.integer(0)


def test_zero_has_a_sign() -> None:
    """1 / -0.0 and 1 / 0.0 differ, but as logits and truths they are one number."""
    assert x.compare_reals("eq", x.real(-0.0), x.real(0.0)) is x.TRUE


@pytest.mark.parametrize("divisor", [0, -3])
def test_divisor_must_be_positive(divisor: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        x.floordiv(I, divisor)


# ------------------------------------------------------------------------------------------- reals


def test_case_trees_add_leaf_by_leaf() -> None:
    c, d = x.at_least(I, J), x.at_least(J, K)
    mask = x.select(c, x.real(0), x.real(-math.inf))
    bias = x.select(d, x.real(-math.inf), x.load("t", (I,)))
    total = dict(x.cases(x.add_reals(mask, bias)))
    assert total[x.conj(c, x.negate(d))] is x.load("t", (I,))
    assert total[x.conj(c, d)] is total[x.conj(x.negate(c), d)] is x.real(-math.inf)
    masked = total[x.conj(x.negate(c), x.negate(d))]
    assert masked.op == "add" and set(masked.args) == {x.real(-math.inf), x.load("t", (I,))}  # its gradient flows


@pytest.mark.parametrize("c", [math.inf, -math.inf, math.nan])
def test_integer_data_and_infinity_add_up(c: float) -> None:
    """An ALiBi bias (minus a distance) under an additive mask."""
    total = x.add_reals(x.from_int(x.minus(J, I)), x.real(c))
    assert total.sort == x.REAL
    assert x.add_reals(x.from_int(I), x.real(2)) is x.from_int(x.plus(I, 2))


def test_quotient_by_a_size_that_may_be_zero() -> None:
    """Nothing is divided when it is built: the size is known at run time."""
    z = x.size_symbol("z", 0, 9)
    assert x.mod(I, z).sort == x.floordiv(I, z).sort == x.INT


def test_cases_are_disjoint_and_complete() -> None:
    c, d = x.at_least(I, J), x.at_least(J, K)
    tree = x.select(c, x.select(d, x.real(1), x.real(2)), x.select(d, x.real(3), x.real(4)))
    for i, j, k in itertools.product(range(6), range(8), range(5)):
        holding = [leaf for given, leaf in x.cases(tree) if value(given, {"i": i, "j": j, "k": k, "n": 0, "s": 2, "t": 1})]
        assert holding == [x.real(1 if i >= j and j >= k else 2 if i >= j else 3 if j >= k else 4)]


@pytest.mark.parametrize(
    "op, a, b, want",
    [
        ("eq", math.nan, math.nan, x.FALSE),
        ("ge", math.nan, 0.0, x.FALSE),
        ("gt", 0.0, math.nan, x.FALSE),
        ("ge", math.inf, math.inf, x.TRUE),
        ("gt", math.inf, 1e300, x.TRUE),
        ("eq", -math.inf, math.inf, x.FALSE),
    ],
)
def test_constants_compare_as_floats_do(op: str, a: float, b: float, want: Expr) -> None:
    assert x.compare_reals(op, x.real(a), x.real(b)) is want


def test_integers_as_reals_compare_as_integers() -> None:
    assert x.compare_reals("ge", x.from_int(I), x.from_int(J)) is x.at_least(I, J)
    assert x.compare_reals("gt", x.from_int(I), x.real(2)) is x.less(x.integer(2), I)
    assert x.compare_reals("gt", x.from_int(I), x.real(2.5)).op == "compare"


def test_truth_of_data() -> None:
    assert x.truth(x.real(0)) is x.FALSE and x.truth(x.real(math.nan)) is x.TRUE
    assert x.truth(x.select(x.at_least(I, J), x.real(1), x.real(0))) is x.at_least(I, J)


def test_scale_reaches_the_leaves() -> None:
    dot = x.dot([x.as_var(K)], [x.load("q", (I, K)), x.load("k", (J, K))])  # type: ignore[list-item]
    masked = x.select(x.at_least(I, J), dot, x.real(-2.0))
    (_, product), (_, fill) = x.cases(x.scaled(x.scaled(masked, 3.0), 0.5))
    assert product.args == (1.5, dot) and fill is x.real(-3.0)


def test_bound_variables_are_not_free() -> None:
    v = x.as_var(K)
    assert v is not None
    assert v not in x.exists(K, x.equal(I, K)).free
    assert v not in x.dot([v], [x.load("q", (I, K))]).free
    assert x.as_var(I) in x.dot([v], [x.load("q", (I, K))]).free


def test_data_have_no_value_at_a_point() -> None:
    with pytest.raises(DataDependent, match="run-time"):
        at_point(x.apply("index", (I,)), {x.as_var(I): 0}, {})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "e, text",
    [
        (x.plus(I, 3), "(i + 3)"),
        (x.minus(x.times(I, 2), J), "(2*i - j)"),
        (x.floordiv(x.plus(I, J), 4), "(i + j)//4"),
        (x.conj(x.at_least(I, J), x.predicate("m", (K,))), "((i - j) >= 0 and m[k])"),
        (x.select(x.at_least(I, J), x.real(1), x.load("t", (I,))), "(1.0 if (i - j) >= 0 else t[i])"),
        (x.compare_reals("gt", x.load("t", (I,)), x.real(0.5)), "t[i] > 0.5"),
    ],
    ids=str,
)
def test_show(e: Expr, text: str) -> None:
    assert x.show(e) == text == repr(e)
