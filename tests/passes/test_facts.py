"""What is taken for granted about top-k, sort and memberships, on data: with ties, infinities and NaN.

The facts are the trusted base of every proof about selections, so each ground instance is evaluated on what torch computes.
The solver knows no NaN. Where reals are compared, a fact has to hold for IEEE comparisons and also when NaN is the largest
number, which is how torch ranks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsa_compile.passes import expr as x
from fsa_compile.passes.expr import Expr
from fsa_compile.passes.facts import ground_facts, membership_facts, order_facts, witness
from fsa_compile.passes.reader import Reader

from .shadow_oracle import Oracle, Reading, read_result

ROWS, BLOCKS, TOP_K = 4, 6, 3
quick = settings(max_examples=25, deadline=None, derandomize=True)
scores = st.lists(
    st.sampled_from([0.0, 1.0, 1.0, 2.0, -1.0, -0.0, math.inf, -math.inf, math.nan]),
    min_size=ROWS * BLOCKS,
    max_size=ROWS * BLOCKS,
).map(lambda v: torch.tensor(v).view(ROWS, BLOCKS))

Choice = Callable[[Tensor], Tensor]
CHOICES: dict[str, Choice] = {
    "topk": lambda s: s.topk(TOP_K, -1).indices,
    "topk of the first axis": lambda s: s.mT.topk(TOP_K, 0).indices.mT,
    "topk, smallest": lambda s: s.topk(TOP_K, -1, largest=False).indices,
    "topk, unsorted": lambda s: torch.topk(s, TOP_K, sorted=False).indices,
    "topk, smallest, unsorted": lambda s: torch.topk(s, TOP_K, -1, False, False).indices,
    "topk of all": lambda s: s.topk(BLOCKS).indices,
    "topk of one": lambda s: s.topk(1).indices,
    "sort": lambda s: s.sort(-1).indices,
    "sort, descending": lambda s: s.sort(-1, descending=True).indices,
    "sort, stable, cut": lambda s: torch.sort(s, dim=-1, descending=True, stable=True).indices[:, :TOP_K],
    "sort, descending, the first": lambda s: s.sort(-1, descending=True).indices[:, :1],
    "argsort": lambda s: s.argsort(-1),
    "argsort, descending": lambda s: s.argsort(-1, descending=True),
    "argsort, descending, cut": lambda s: s.argsort(dim=-1, descending=True)[..., :TOP_K],
    "argsort of the first axis, stable, cut": lambda s: torch.argsort(s.mT, dim=0, descending=True, stable=True)[:TOP_K].mT,
    "topk of masked scores": lambda s: (
        s.masked_fill(torch.arange(BLOCKS) > torch.arange(ROWS)[:, None], -math.inf).topk(TOP_K).indices
    ),
    "topk with a forced block": lambda s: (
        s.masked_fill(torch.arange(BLOCKS) == torch.arange(ROWS)[:, None], math.inf).topk(TOP_K).indices
    ),
}
each_choice = pytest.mark.parametrize(
    "choice", CHOICES.values(), ids=lambda c: next(k for k, v in CHOICES.items() if v is c).replace(" ", "_")
)


class FactOracle(Oracle):
    """An oracle that knows the witness of each membership: a slot at which it holds, if there is one."""

    witnesses: dict[Expr, Expr]

    def _apply(self, e: Expr) -> Tensor:
        if not isinstance(e.args[0], tuple):
            return self.element(*e.args)
        v, body = self.witnesses[e].args
        inner = self._inside((v,))
        holds = torch.as_tensor(inner(body)).expand([*self._lead(), inner.extents[-1]])
        return holds.long().argmax(-1)


def assert_hold(reading: Reading, facts: Iterable[Expr], axes: tuple[Expr, ...], ranked: bool = True) -> int:
    """Every fact is true on the data of the reading, for all values of the axes; how many there were.

    `ranked`: also with NaN as the largest number. Not where `nan_to_num` is read: the NaN is gone before anything ranks it.
    """
    facts = list(facts)
    variables = [x.as_var(a) for a in axes]
    memberships = {e for f in (*facts, reading.expression) for e in x.walk(f) if e.op == "exists"}
    for values in (reading.values, {k: _nan_largest(v) for k, v in reading.values.items()})[: 1 + ranked]:
        view = Reading(reading.reader, reading.node, reading.expression, reading.axes, reading.eager, values)
        oracle = FactOracle(
            variables,
            [x.constant(v.args[1]) for v in variables],
            view._tensor,
            view._shape,
            _no_size,
            torch.device("cpu"),  # type: ignore[union-attr]
        )
        oracle.reader = reading.reader
        oracle.witnesses = {a: e for e in memberships if (a := x.as_atom(witness(e))) is not None}
        for f in facts:
            assert f.free <= set(variables), f"free variables: {f}"
            assert torch.as_tensor(oracle(f)).all(), f"false on data: {f}"
    return len(facts)


def _nan_largest(v: object) -> object:
    return v.nan_to_num(math.inf, math.inf, -math.inf) if isinstance(v, Tensor) and v.is_floating_point() else v


def _no_size(name: str) -> int:
    raise KeyError(name)


def mask_of(choice: Choice) -> Callable[[Tensor], Tensor]:
    """The dense mask of the chosen blocks."""
    return lambda s: torch.zeros(ROWS, BLOCKS, dtype=torch.bool).scatter(-1, choice(s), True)


@each_choice
@quick
@given(s=scores)
def test_ground_facts_of_a_mask(choice: Choice, s: Tensor) -> None:
    """In range, distinct, a witness where the membership holds, a membership where a term shows it."""
    reading = read_result(mask_of(choice), s)
    reading.check()
    row, block = reading.axes
    terms = (x.ZERO, x.ONE, x.integer(BLOCKS - 1))
    facts = ground_facts(reading.reader, [reading.expression], terms)
    assert assert_hold(reading, facts, reading.axes) >= 1 + len(terms)


@each_choice
@quick
@given(s=scores)
def test_two_slots_hold_different_indices(choice: Choice, s: Tensor) -> None:
    reading = read_result(lambda s: choice(s).clone(), s)
    row, slot = reading.axes
    width = reading.eager.shape[1]
    other = x.var("other", width) if width > 1 else x.ZERO
    row2 = x.var("row2", ROWS)
    there, elsewhere = (reading.reader.read(reading.node, (r, other)) for r in (row, row2))
    facts = ground_facts(reading.reader, [x.equal(reading.expression, there), x.equal(reading.expression, elsewhere)], ())
    axes = tuple(a for a in (row, slot, other, row2) if x.as_var(a) is not None)
    assert assert_hold(reading, facts, axes) >= 1
    if width > 1:
        distinct = x.implies(x.equal(reading.expression, there), x.equal(slot, other))
        assert_hold(reading, [distinct], axes)


@each_choice
@quick
@given(s=scores)
def test_a_block_that_is_not_picked_does_not_outrank_the_first(choice: Choice, s: Tensor) -> None:
    reading = read_result(mask_of(choice), s)
    facts, _ = order_facts(reading.reader, [reading.expression], reading.axes[1])
    assert_hold(reading, facts, reading.axes)


@pytest.mark.parametrize(
    "name, ordered",
    [
        ("topk", True),
        ("topk, unsorted", True),
        ("topk, smallest", False),
        ("topk, smallest, unsorted", False),
        ("sort", False),
        ("sort, descending", True),
        ("sort, stable, cut", True),
        ("sort, descending, the first", True),
        ("argsort", False),
        ("argsort, descending", True),
        ("argsort, descending, cut", True),
        ("argsort of the first axis, stable, cut", True),
        ("topk with a forced block", True),
    ],
)
def test_only_the_largest_first_have_an_order(name: str, ordered: bool) -> None:
    """With `largest=False` the fact is false: it made a prototype accept 1,280 wrong rows while every other test stayed green."""
    reading = read_result(mask_of(CHOICES[name]), torch.randn(ROWS, BLOCKS, generator=torch.Generator().manual_seed(0)))
    facts, picks = order_facts(reading.reader, [reading.expression], reading.axes[1])
    assert bool(facts) is bool(picks) is ordered


def test_no_block_outranks_the_first_of_a_sort_whatever_part_is_read() -> None:
    """Not even one that is in no slot that the model reads; of a top-k this holds only of blocks that it did not pick."""
    s = torch.randn(ROWS, BLOCKS, generator=torch.Generator().manual_seed(0))
    reading = read_result(mask_of(CHOICES["sort, descending, the first"]), s)
    facts, _ = order_facts(reading.reader, [reading.expression], reading.axes[1])
    assert not any(t.op == "exists" for f in facts for t in x.walk(f))
    assert_hold(reading, facts, reading.axes)
    ascending = read_result(mask_of(lambda s: s.sort(-1).indices[:, :1]), s)
    wrong = Reading(reading.reader, reading.node, reading.expression, reading.axes, ascending.eager, ascending.values)
    with pytest.raises(AssertionError, match="false on data"):
        assert_hold(wrong, facts, reading.axes)


def test_the_order_fact_would_be_false_for_the_smallest() -> None:
    """So that the tests above can fail: the same formula about `largest=False` is refuted by data."""
    s = torch.randn(ROWS, BLOCKS, generator=torch.Generator().manual_seed(0))
    largest, smallest = (read_result(mask_of(CHOICES[name]), s) for name in ("topk", "topk, smallest"))
    facts, _ = order_facts(largest.reader, [largest.expression], largest.axes[1])
    wrong = Reading(largest.reader, largest.node, largest.expression, largest.axes, smallest.eager, smallest.values)
    with pytest.raises(AssertionError, match="false on data"):
        assert_hold(wrong, facts, largest.axes)


MINIMA: dict[str, Choice] = {
    "amin": lambda s: s.topk(TOP_K).values.amin(-1),
    "amin, keepdim": lambda s: s.topk(TOP_K).values.amin(-1, keepdim=True).squeeze(-1),
    "min": lambda s: s.topk(TOP_K).values.min(-1).values,
    "min, keepdim": lambda s: s.topk(TOP_K, 1).values.min(1, keepdim=True).values[:, 0],
    "amin of the first axis": lambda s: s.mT.topk(TOP_K, 0).values.amin(0),
}


@pytest.mark.parametrize("minimum", MINIMA.values(), ids=[k.replace(" ", "_") for k in MINIMA])
@quick
@given(s=scores.map(lambda s: s.nan_to_num(0.5, math.inf, -math.inf)))
def test_a_minimum_is_at_most_each_element(minimum: Choice, s: Tensor) -> None:
    """Of data without NaN; a NaN minimum is the only entry that torch would let through nowhere."""
    reading = read_result(lambda s: (s >= minimum(s)[:, None]) & mask_of(CHOICES["topk"])(s), s)
    facts = ground_facts(reading.reader, [reading.expression], (x.ZERO,))
    assert any(t.op == "compare" for f in facts for t in x.walk(f))
    assert_hold(reading, facts, reading.axes)


def test_membership_by_comparison_has_the_same_facts() -> None:
    """``(list[..., None] == block).any(-2)``, and conditions on the slot."""
    s = torch.randn(ROWS, BLOCKS, generator=torch.Generator().manual_seed(1))

    def fn(s: Tensor) -> Tensor:
        top = s.topk(TOP_K)
        return ((top.indices[..., None] == torch.arange(BLOCKS)) & (top.values > 0)[..., None]).any(-2)

    reading = read_result(fn, s)
    reading.check()
    assert assert_hold(reading, ground_facts(reading.reader, [reading.expression], (x.ZERO, x.ONE)), reading.axes) >= 3


def test_introduction_outside_the_list_says_nothing() -> None:
    """A term beyond the last slot must not make a membership true."""
    slot, i, j = x.var("slot", 3), x.var("i", 4), x.var("j", 4)
    e = x.exists(slot, x.equal(x.apply("list", (i, slot), 0, 3), j))
    facts = list(membership_facts(e, (x.integer(7),)))
    assert facts[1:] == [x.TRUE]


def test_facts_hold_no_bound_variable() -> None:
    s = torch.randn(ROWS, BLOCKS, generator=torch.Generator().manual_seed(2))
    reading = read_result(mask_of(CHOICES["topk"]), s)
    free = {x.as_var(a) for a in reading.axes}
    assert all(f.free <= free for f in ground_facts(reading.reader, [reading.expression], (x.ZERO,)))


def test_lists_of_unknown_origin_have_no_pick_facts() -> None:
    """Indices that are an input of the graph may repeat and may lie outside."""
    reading = read_result(
        lambda i: torch.zeros(3, 5, dtype=torch.bool).scatter(-1, i, True), torch.tensor([[1, 1], [0, 4], [2, 2]])
    )
    facts = ground_facts(reading.reader, [reading.expression], ())
    assert len(facts) == 1  # the witness
    assert_hold(reading, facts, reading.axes)
    assert isinstance(reading.reader, Reader) and not reading.reader.tops
