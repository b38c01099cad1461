"""What both rules of ranking have to prove about a selected branch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...registry.pattern import Segment
from ...report import Proof, ReasonKind
from .. import expr as x
from ..classify import Match
from ..evaluate import at_point, DataDependent
from ..expr import Expr
from ..prove import Prover
from ..reader import Mode, Reader
from .listed import kept, take_apart

WRITTEN_OUT = 16
"""A condition on one of so few slots is written out."""


@dataclass
class Cases:
    """When a block is forced into the list, left out of it, or scored."""

    forced: list[Expr] = field(default_factory=list)
    excluded: list[Expr] = field(default_factory=list)
    scored: list[Expr] = field(default_factory=list)


class Question:
    """One selected branch, and whether its list is the op's.

    Args:
        r: Reader of the shadow graph.
        selected: The branch.
        prover: Proves, within the graph's budget.

    Attributes:
        form, block_size: Of the branch.
        head, block: Variables: a key/value head, and a block that may be listed.
        eligible: Whether the block begins at the query or before it.
        scores: The cases of the score of `block`, each with its condition.
        listed: The list.
        proofs: The obligations discharged so far.

    Raises:
        Refusal: If no op makes such a list, whatever it ranks.
    """

    def __init__(self, r: Reader, selected: Match, prover: Prover) -> None:
        self.r, self.prover, self.form = r, prover, selected.form
        parameters, blocks = selected.candidate.parameters, selected.candidate.blocks
        if blocks is None or blocks.per_query_head and self.form.groups > 1:
            raise kept("each query head has its own list, and the op ranks for groups of query heads")
        if parameters["rule"] != "causal" or "q_offset" in parameters:
            raise kept("the selected keys are not cut off at the query, so blocks after it count")
        self.block_size = blocks.block_size
        self.head = x.var("ranking.head", self.form.kv_heads) if self.form.kv_heads > 1 else x.ZERO
        self.listed = take_apart(r, self.form, blocks, self.head)
        source = r.tops[self.listed.top][0].args[0]
        self.count = r.shape(source)[self.listed.axis]
        if self.count is not x.floordiv(x.plus(self.form.keys, self.block_size - 1), self.block_size):
            raise kept("not every block of keys is ranked")
        self.block = x.var("ranking.block", self.count)
        self.own = x.floordiv(self.form.i, self.block_size)
        self.eligible = x.at_least(self.form.i, x.times(self.block, self.block_size))
        self.scores = [(_written_out(g), e) for g, e in x.cases(r.read(source, self.listed.element(self.block), Mode.SCORE))]
        self.proofs: list[Proof] = []

    def prove(self, obligation: str, text: str, goal: Expr, given: Expr) -> None:
        """Discharge an obligation, or refuse with `text`."""
        name = f"selection: {obligation}"
        self.proofs.append(self.prover.require(ReasonKind.SCORES, text, name, goal, given, terms=(x.ZERO,)))

    def forced(self, cases: Cases) -> tuple[int, int, int, Expr]:
        """What is forced: ``top_k, n_init, n_local`` of the op, and the formula.

        Raises:
            Refusal: If it is not the first and the last blocks of a query, or something else is in the list.
        """
        added = [s for s in self.listed.singles if self._added(s, cases)]
        width = x.constant(self.listed.pick.args[1])
        assert width is not None
        top_k = width + len(added)
        by_model = x.disj(*cases.forced, *(x.equal(self.block, s.entry) for s in added))
        n_init, n_local = self._fitted(by_model)
        if n_init + n_local > top_k:
            raise kept(f"{n_init + n_local} blocks are forced into a list of {top_k}")
        early = x.less(self.block, x.integer(n_init))
        forced = x.disj(early, x.less(x.integer(-n_local), x.minus(self.block, self.own)))
        self.prove(
            "forced blocks", "the forced blocks are not the first and the last of a query",
            x.conj(x.implies(self.eligible, x.iff(by_model, forced)), x.implies(by_model, x.disj(self.eligible, early))), x.TRUE,
        )  # fmt: skip
        self.prove(
            "excluded blocks", "a block that the query sees is left out of the ranking",
            x.disj(x.negate(self.eligible), forced), x.disj(*cases.excluded),
        )  # fmt: skip
        self._prove_list(forced, [s for s in self.listed.singles if s not in added])
        return top_k, n_init, n_local, forced

    def _added(self, single: Segment, cases: Cases) -> bool:
        """Whether a single block beside the list never ranks among the picks that count."""
        low = x.substitute(x.disj(*cases.excluded), {x.as_var(self.block): single.entry})  # type: ignore[dict-item]
        given = x.in_range(single.entry, self.count)
        return single.valid is x.TRUE and isinstance(self.prover.prove("selection: added block", low, given), Proof)

    def _fitted(self, forced: Expr) -> tuple[int, int]:
        """How many first and last blocks are forced, as the last query sees it."""
        last = self.r.sizes.hint(self.form.sizes[2]) - 1
        values = dict.fromkeys(forced.free, 0) | {x.as_var(self.form.i): last}

        def holds(block: int) -> bool:
            try:
                return bool(at_point(forced, {**values, x.as_var(self.block): block}, self.r.sizes.hints))
            except DataDependent:
                raise kept("which blocks are forced depends on data") from None

        own = last // self.block_size
        n_init = next((j for j in range(own + 1) if not holds(j)), own + 1)
        if n_init == own + 1:
            raise kept("every block is forced")
        return n_init, next(j for j in range(own + 1) if not holds(own - j))

    def _prove_list(self, forced: Expr, singles: list[Segment]) -> None:
        """Slots that do not count hold blocks after the query, and single blocks beside the list are forced ones."""
        pick = x.apply(self.listed.top, self.listed.at, 0, self.count.hi - 1)
        here = x.conj(x.equal(pick, self.block), self.eligible, x.in_range(self.block, self.count))
        counts = _of_finite_scores(self.listed.counts)
        self.prove("all picks count", "a pick that the query sees is left out of the list", counts, here)
        for single in singles:
            in_list = x.substitute(x.conj(self.eligible, forced), {x.as_var(self.block): single.entry})  # type: ignore[dict-item]
            self.prove("single blocks", "a block is added to the list", in_list, x.in_range(single.entry, self.count))


def _written_out(e: Expr) -> Expr:
    """A condition in which "one of a few slots" is a disjunction."""

    def go(t: object) -> object:
        if isinstance(t, tuple):
            return tuple(go(y) for y in t)
        if not isinstance(t, Expr) or t.sort != x.BOOL:
            return t
        if t.op == "exists":
            v, body = t.args
            size = x.constant(v.args[1])
            if size is not None and size <= WRITTEN_OUT:
                return x.disj(*(x.substitute(body, {v: x.integer(k)}) for k in range(size)))
            return t
        return x.rebuild(t, go)

    out = go(e)
    assert isinstance(out, Expr)
    return out


def _of_finite_scores(e: Expr) -> Expr:
    """A condition with comparisons of data and infinities decided: scores of blocks that count are finite."""

    def go(t: object) -> object:
        if isinstance(t, tuple):
            return tuple(go(y) for y in t)
        if not isinstance(t, Expr):
            return t
        if t.op == "compare":
            op, a, b = t.args
            for left, right, sign in ((a, b, 1), (b, a, -1)):
                if right.op == "const" and math.isinf(right.args[0]) and left.op != "const":
                    return x.boolean(op != "eq" and sign * right.args[0] < 0)
            return t
        return x.rebuild(t, go) if t.sort == x.BOOL else t

    out = go(e)
    assert isinstance(out, Expr)
    return out
