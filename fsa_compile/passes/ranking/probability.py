"""Scores that are the compressed probabilities of a group, by the overlap of key and block: the rule of `fsa::select_blocks`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from .. import expr as x
from ..classify import Match
from ..evaluate import at_point, DataDependent
from ..expr import Expr
from ..nodes import op_name
from ..normal_form import SAFE
from .listed import kept
from .question import Cases, Question
from .shares import Share, sum_of_probabilities

OTHER_WEIGHTS = "the probabilities are weighted by something else than the overlap of key and block"
NO_SUM = "the scores are not sums of the probabilities of compressed attention"
TERMS = 256
"""So many terms of a sum over offsets (the shifts of equation 9) are written out."""


class ByProbability:
    """The scores of a question as sums of probabilities.

    Args:
        q: The question.
        branches: The compressed branches that are rewritten, by the name of their softmax.

    Attributes:
        cases: When a block is forced, excluded or scored.
        branch: The compressed branch whose probabilities are summed.

    Raises:
        Refusal: If the scores are something else.
    """

    def __init__(self, q: Question, branches: Mapping[str, Match]) -> None:
        self.q = q
        leaves = []
        for given, leaf in q.scores:
            constant, shares = sum_of_probabilities(leaf)
            if shares is None or math.isnan(constant):
                raise kept(NO_SUM)
            leaves.append((given, constant, shares))
        self.shares = [s.where(given) for given, constant, shares in leaves if constant == 0 for s in shares]
        if not self.shares:
            raise kept(NO_SUM)
        self.branch = self._branch(branches)
        self.key = x.var("ranking.key", self.branch.form.width)
        self.cases = Cases()
        highest = self._bound(self.shares)
        for given, constant, shares in leaves:
            if shares and constant == 0:
                self.cases.scored.append(given)
            elif constant == -math.inf or constant + self._bound(shares) <= 0:
                self.cases.excluded.append(given)
            elif constant == math.inf or constant > highest:  # sums are finite, whatever a dynamic length is
                self.cases.forced.append(given)
            else:
                raise kept(f"blocks with the fixed score {constant:g} may tie with others")

    def kernel_size(self, forced: Expr) -> int:
        """The kernel size under which the scores are the op's, with a proof that they are, up to a factor, and have no ties.

        Args:
            forced: Which blocks are forced.

        Raises:
            Refusal: If there is none.
        """
        q, p, size = self.q, self.branch.candidate.parameters, self.q.block_size
        weight = self._weight()
        for kernel_size in dict.fromkeys((p["last"] + 1, p["last"], p["stride"], 2 * p["stride"], size)):
            shared = self._overlap(self.key, kernel_size)
            ratio = self._ratio(weight, shared)
            if ratio is None:
                continue
            theirs, ours = ratio
            given = x.conj(x.disj(*self.cases.scored), q.eligible, self._seen(self.key))
            q.prove("weights", OTHER_WEIGHTS, x.equal(x.times(weight, ours), x.times(shared, theirs)), given)
            self._prove_no_ties(forced, kernel_size)
            return kernel_size
        raise kept(OTHER_WEIGHTS)

    def _branch(self, branches: Mapping[str, Match]) -> Match:
        """The compressed branch that all shares take their probabilities from."""
        (name, *others) = {s.softmax for s in self.shares}
        branch = branches.get(name)
        if others or branch is None or branch.candidate.role != "compressed":
            raise kept("the scores are not the probabilities of a compressed branch that is rewritten")
        if branch.form.groups != self.q.form.groups or branch.form.kv_heads != self.q.form.kv_heads:
            raise kept("the compressed branch has other heads than the selected one")
        return branch

    def _bound(self, shares: Sequence[Share]) -> float:
        """No sum of these is larger: a share takes each probability of a row at most once per query head and offset."""
        total = 0.0
        for s in shares:
            axis = self.q.r.softmax_axis(self.q.r.nodes[s.softmax])[1]
            repeats = math.prod(v.args[1].hi for v in s.bound if x.poly(v) is not s.at[axis])
            total += abs(s.factor) * max(abs(s.count.lo), abs(s.count.hi)) * repeats
        return total * (1 + 1e-3)  # probabilities are rounded

    # -- compressed keys
    def _begin(self, key: Expr) -> Expr:
        p = self.branch.candidate.parameters
        return x.times(x.minus(key, p["prefix"]), p["stride"])

    def _seen(self, key: Expr) -> Expr:
        """Whether the query sees a compressed key."""
        p = self.branch.candidate.parameters
        seen = x.at_least(self.q.form.i, x.plus(self._begin(key), p["last"]))
        return x.disj(x.less(key, x.integer(p["prefix"])), seen)

    def _overlap(self, key: Expr, kernel_size: int) -> Expr:
        """How many tokens a compressed key and the block share; a prefix key shares none."""
        begin, start = self._begin(key), x.times(self.q.block, self.q.block_size)
        end, stop = x.plus(begin, kernel_size), x.plus(start, self.q.block_size)
        left, right = x.select(x.at_least(begin, start), begin, start), x.select(x.at_least(stop, end), end, stop)
        shared = x.select(x.at_least(right, left), x.minus(right, left), x.ZERO)
        return x.select(x.less(key, x.integer(self.branch.candidate.parameters["prefix"])), x.ZERO, shared)

    # -- weights
    def _weight(self) -> Expr:
        """How often the probability of the compressed key counts in the score of the block, as an integer up to a factor."""
        unit = min(abs(s.factor) for s in self.shares)
        total = x.ZERO
        for s in self.shares:
            times = round(s.factor / unit)
            if s.factor <= 0 or abs(s.factor / unit - times) > 1e-6:
                raise kept("probabilities are weighted by numbers of no common measure")
            for given, count in self._of_key(s):
                total = x.plus(total, x.select(given, x.times(count, times), x.ZERO))
        return total

    def _of_key(self, s: Share) -> Iterator[tuple[Expr, Expr]]:
        """When, and how often, a share takes the probability of the compressed key of each query head of the group."""
        axis = self.q.r.softmax_axis(self.q.r.nodes[s.softmax])[1]
        member = self._member(s, axis)
        offsets = [v for v in s.bound if v is not member]
        direct = next((v for v in offsets if x.poly(v) is s.at[axis]), None)
        first = {} if direct is None else {direct: self.key}
        inside = x.TRUE if direct is None else x.in_range(self.key, direct.args[1])
        rest = [v for v in offsets if v is not direct]
        if math.prod(v.args[1].hi for v in rest) > TERMS:
            raise kept("the scores are a sum over too many offsets")
        for values in _points(rest):
            at = {**first, **values}
            taken = x.equal(x.substitute(s.at[axis], at), self.key)
            yield x.conj(x.substitute(s.given, at), taken, inside), x.substitute(s.count, at)

    def _member(self, s: Share, axis: int) -> Expr | None:
        """The variable of a share that runs over the query heads of the group; None if a group is one head."""
        q, form = self.q, self.branch.form
        read = [c for k, c in enumerate(s.at) if k != axis]
        for member in s.bound if form.groups > 1 else (None,):
            if member is not None and x.constant(member.args[1]) != form.groups:
                continue
            head = x.times(q.head, form.groups)
            mapping = {form.b: q.form.b, form.i: q.form.i, form.h: head if member is None else x.plus(head, x.poly(member))}
            named = {v: e for e_, e in mapping.items() if (v := x.as_var(e_)) is not None}
            expected = [x.substitute(c, named) for k, c in enumerate(form.probability) if k != axis]
            if expected == read and member not in s.at[axis].free | s.given.free | s.count.free:
                return member
        raise kept("the scores are not summed over the query heads of each group")

    def _ratio(self, weight: Expr, shared: Expr) -> tuple[int, int] | None:
        """(weight, overlap) of some key, if the two are proportional for a block in the middle."""
        hint = self.q.r.sizes.hint
        values = dict.fromkeys(weight.free | shared.free, 0)
        values |= {x.as_var(self.q.block): hint(self.q.count) // 2, x.as_var(self.q.form.i): hint(self.q.form.sizes[2]) - 1}
        found: tuple[int, int] | None = None
        for c in range(hint(self.branch.form.width)):
            try:
                a, b = (int(at_point(e, {**values, x.as_var(self.key): c}, self.q.r.sizes.hints)) for e in (weight, shared))
            except DataDependent:
                raise kept("how much a probability counts depends on data") from None
            if a or b:
                found = found or (a, b)
                if not a or not b or a * found[1] != b * found[0]:
                    return None
        return found

    def _prove_no_ties(self, forced: Expr, kernel_size: int) -> None:
        q, p = self.q, self.branch.candidate.parameters
        scored = x.disj(*self.cases.scored)
        first = x.plus(x.floordiv(x.times(q.block, q.block_size), p["stride"]), p["prefix"])
        overlaps = x.less(x.ZERO, self._overlap(first, kernel_size))
        q.prove(
            "every block is scored", "a block that the query sees overlaps no compressed key that it sees, so its score is zero",
            x.conj(x.in_range(first, self.branch.form.width), self._seen(first), overlaps),
            x.conj(q.eligible, x.negate(forced)),
        )  # fmt: skip
        real = x.conj(x.less(x.ZERO, self._overlap(self.key, kernel_size)), self._seen(self.key))
        q.prove("later blocks score zero", "a block after the query has a score", q.eligible, x.conj(scored, real))
        form = self.branch.form
        finite = form.settled and -math.inf not in form.fills
        safe = self.branch.empty_value is None or finite or op_name(q.r.nodes[form.softmax]) in SAFE
        if not safe and not all(s.zeroed for s in self.shares):
            q.prove("no NaN", "the scores of a query that sees no compressed key are NaN", q.eligible, scored)


def _points(variables: Sequence[Expr]) -> Iterator[dict[Expr, Expr]]:
    """All values of variables of constant ranges."""
    if not variables:
        yield {}
        return
    for rest in _points(variables[1:]):
        for value in range(int(variables[0].args[1].hi)):
            yield {variables[0]: x.integer(value), **rest}
