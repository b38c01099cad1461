"""Whether a top-k picks the blocks that `fsa::select_blocks` picks: then score and top-k are replaced too.

Taking the user's list is always right and always slow: the scores are a tensor of queries times compressed keys. The op
computes them again from the log-sum-exps of the compressed branch, a tile at a time. A list may be replaced by the op's if both
hold the same blocks wherever that reaches the output, in real arithmetic:

* **Scores.** What is ranked, read at (batch, key/value head, query, block), is a positive multiple of the sum, over the query
  heads of the group and the compressed keys, of the probabilities of one compressed branch times the overlap of key and block
  (equation 9 of the NSA paper).
* **Cases.** It is a constant above every such sum exactly for the first and the last few blocks up to the query's own (these are
  forced), and at most zero only for blocks that begin after the query. A block that is added to the list behind the top-k, and
  has such a low score in it, is forced too.
* **Ties.** Every other block up to the query's own overlaps a compressed key that the query sees, so its score is positive; a
  block after the query's overlaps none, so its score is zero. Zeros tie among themselves only, and under the rule "causal" the
  query sees nothing of these blocks, picked or not. Positive scores tie on a set of measure zero.
* **Room.** The forced blocks fit into the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace


from ..registry.pattern import Segment
from ..report import Proof, ReasonKind
from . import expr as x
from .classify import Match
from .evaluate import at_point, DataDependent
from .expr import Expr
from .nodes import argument, op_name
from .normal_form import SAFE
from .prove import Prover
from .reader import Coords, Mode, Reader
from .refusal import Refusal

OTHER_WEIGHTS = "the probabilities are weighted by something else than the overlap of key and block"
EXPANDED = 256
"""So many terms of a sum over offsets (the shifts of equation 9) are written out."""


@dataclass(frozen=True)
class Ranking:
    """A top-k that ranks as `fsa::select_blocks` does.

    Attributes:
        compressed: Name of the softmax node of the branch whose probabilities it sums.
        kernel_size, block_size, top_k, n_init, n_local: As in `reference.select_blocks`.
        proofs: The discharged obligations.
    """

    compressed: str
    kernel_size: int
    block_size: int
    top_k: int
    n_init: int
    n_local: int
    proofs: tuple[Proof, ...]

    def parameters(self) -> dict[str, int]:
        """What the report shows."""
        names = ("kernel_size", "block_size", "top_k", "n_init", "n_local")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Share:
    """``factor * count * p[at]``, summed over `bound` where `given`: a part of a score.

    Attributes:
        softmax: The node that holds the probabilities p.
        at: The element.
        factor, count: The constant and the integer factor.
        bound: The variables that are summed over.
        given: Which terms of the sum there are.
        zeroed: Whether NaN probabilities are replaced by zero.
    """

    softmax: str
    at: Coords
    factor: float = 1.0
    count: Expr = x.ONE
    bound: tuple[Expr, ...] = ()
    given: Expr = x.TRUE
    zeroed: bool = False


@dataclass
class _Cases:
    """When a block is forced, left out or scored, and by which sum."""

    shares: list[_Share]
    forced: list[Expr] = field(default_factory=list)
    excluded: list[Expr] = field(default_factory=list)
    scored: list[Expr] = field(default_factory=list)


def ranking(r: Reader, selected: Match, compressed: Mapping[str, Match], prover: Prover) -> Ranking:
    """Prove that the list of a selected branch is what `fsa::select_blocks` returns, as far as the output can tell.

    Args:
        r: Reader of the shadow graph.
        selected: The selected branch.
        compressed: The compressed branches that are rewritten, by the name of their softmax.
        prover: Proves, within the graph's budget.

    Raises:
        Refusal: If it is not, or not provably.
    """
    return _Question(r, selected, compressed, prover).answer()


class _Question:
    """One selected branch, and whether its list is the op's."""

    def __init__(self, r: Reader, selected: Match, compressed: Mapping[str, Match], prover: Prover) -> None:
        self.r, self.prover, self.branches = r, prover, compressed
        self.parameters, self.form = selected.candidate.parameters, selected.form
        blocks = selected.candidate.blocks
        if blocks is None or blocks.per_query_head and self.form.groups > 1:
            raise _kept("each query head has its own list, and the op ranks for groups of query heads")
        if self.parameters["rule"] != "causal" or "q_offset" in self.parameters:
            raise _kept("the selected keys are not cut off at the query, so blocks after it count")
        self.blocks, self.block_size = blocks, blocks.block_size
        self.head = x.var("ranking.head", self.form.kv_heads) if self.form.kv_heads > 1 else x.ZERO
        self.top, self.picked, self.valid, self.others = self._the_top_k()
        node, axis = self.r.tops[self.top]
        self.source, self.axis = node.args[0], axis
        self.count = self.r.shape(self.source)[axis]
        self.block = x.var("ranking.block", self.count)
        self.proofs: list[Proof] = []

    def answer(self) -> Ranking:
        form, size = self.form, self.block_size
        if self.count is not x.floordiv(x.plus(form.keys, size - 1), size):
            raise _kept("not every block of keys is ranked")
        cases = self._cases()
        branch = self._branch(cases.shares)
        added = [s for s in self.others if self._added(s, cases)]
        width = x.constant(x.as_var(self.picked[self.axis]).args[1])  # type: ignore[union-attr]
        assert width is not None
        top_k = width + len(added)
        cases.forced += [x.equal(self.block, s.entry) for s in added]
        n_init, n_local = self._forced(cases)
        if n_init + n_local > top_k:
            raise _kept(f"{n_init + n_local} blocks are forced into a list of {top_k}")
        forced = x.disj(x.less(self.block, x.integer(n_init)), x.less(x.integer(-n_local), x.minus(self.block, self.own)))
        self._prove_cases(cases, forced, n_init)
        kernel_size = self._overlap(cases, branch)
        self._prove_ties(cases, branch, forced, kernel_size)
        self._prove_list(forced, [s for s in self.others if s not in added])
        return Ranking(branch.form.softmax, kernel_size, size, top_k, n_init, n_local, tuple(self.proofs))

    # -- the list
    def _the_top_k(self) -> tuple[str, Coords, Expr, list[Segment]]:
        """The top-k of the list, the element of it in a slot, when that slot counts, and the single blocks beside the picks."""
        leader = {h: x.times(self.head, self.form.groups)} if (h := x.as_var(self.form.h)) is not None else {}
        mapping = {**self.blocks.index, **leader}
        found: list[tuple[str, Coords, Expr]] = []
        singles: list[Segment] = []
        for s in self.blocks.segments:
            entry, valid = (x.substitute(e, mapping) for e in (s.entry, s.valid))
            for given, leaf in _int_cases(entry):
                number, slot = x.constant(leaf), x.as_var(s.slot)
                if number is not None and (number < 0 or number >= self.r.sizes.hint(self.form.keys)):
                    continue  # no block
                picks = self._picks(leaf, slot, x.conj(given, valid)) if slot is not None else None
                if picks is not None:
                    found.append(picks)
                elif slot not in leaf.free:
                    singles.append(Segment(leaf, self._somewhere(x.conj(given, valid), slot), x.ZERO))
                else:
                    raise _kept("the list holds more than the result of one top-k and single blocks")
        if len(found) != 1:
            raise _kept(f"the list is made of {len(found)} results of a top-k")
        return *found[0], singles

    def _picks(self, leaf: Expr, slot: Expr, counts: Expr) -> tuple[str, Coords, Expr] | None:
        """An element of a top-k, moved so that `slot` counts its picks, and when it counts; None if it is something else."""
        atom = x.as_atom(leaf)
        if atom is None or atom.op != "apply" or atom.args[0] not in self.r.tops:
            return None
        node, axis = self.r.tops[atom.args[0]]
        if op_name(node) != "topk" or not argument(node, 3, "largest", True):
            return None
        width = x.constant(self.r.sizes.shape(node.meta["val"][1])[axis])
        ahead = x.constant(x.minus(_slot_of(atom, axis), x.poly(slot)))
        slots = x.constant(slot.args[1])
        if width is None or ahead is None or slots is None:
            return None
        if not 0 <= -ahead <= slots - width:
            raise _kept("a part of the picks is in the list")
        pick = x.var("ranking.pick", width)
        moved = {slot: x.minus(pick, ahead)}
        at = tuple(x.substitute(c, moved) for c in atom.args[1])
        return atom.args[0], at, x.substitute(counts, moved)

    @staticmethod
    def _somewhere(counts: Expr, slot: Expr | None) -> Expr:
        """When a block that does not depend on the slot is in the list."""
        if slot is None or slot not in counts.free:
            return counts
        ends = (x.ZERO, x.minus(slot.args[1], 1))
        return x.disj(*(x.substitute(counts, {slot: end}) for end in ends))

    @property
    def own(self) -> Expr:
        return x.floordiv(self.form.i, self.block_size)

    @property
    def eligible(self) -> Expr:
        """Whether the block begins at the query or before it."""
        return x.at_least(self.form.i, x.times(self.block, self.block_size))

    # -- the scores
    def _cases(self) -> _Cases:
        at = (*self.picked[: self.axis], self.block, *self.picked[self.axis + 1 :])
        leaves = []
        for given, leaf in x.cases(self.r.read(self.source, at, Mode.SCORE)):
            constant, shares = _sum_of_probabilities(leaf)
            if shares is None or math.isnan(constant):
                raise _kept("the scores are not sums of the probabilities of compressed attention")
            leaves.append((given, constant, [replace(s, given=x.conj(given, s.given)) for s in shares]))
        cases = _Cases([s for _, constant, shares in leaves if constant == 0 for s in shares])
        if not cases.shares:
            raise _kept("the scores are not sums of the probabilities of compressed attention")
        highest = self._bound(cases.shares)
        for given, constant, shares in leaves:
            if shares and constant == 0:
                cases.scored.append(given)
            elif constant + self._bound(shares) <= 0:
                cases.excluded.append(given)
            elif constant > highest:
                cases.forced.append(given)
            else:
                raise _kept(f"blocks with the fixed score {constant:g} may tie with others")
        return cases

    def _bound(self, shares: Sequence[_Share]) -> float:
        """No sum of these is larger: a share takes each probability of a row at most once per query head and offset."""
        total = 0.0
        for s in shares:
            axis = self.r.softmax_axis(self.r.nodes[s.softmax])[1]
            repeats = math.prod(v.args[1].hi for v in s.bound if x.poly(v) is not s.at[axis])
            total += abs(s.factor) * max(abs(s.count.lo), abs(s.count.hi)) * repeats
        return total * (1 + 1e-3)  # probabilities are rounded

    def _branch(self, shares: Sequence[_Share]) -> Match:
        """The compressed branch that all shares take their probabilities from."""
        (name, *others) = {s.softmax for s in shares}
        branch = self.branches.get(name)
        if others or branch is None or branch.candidate.role != "compressed":
            raise _kept("the scores are not the probabilities of a compressed branch that is rewritten")
        if branch.form.groups != self.form.groups or branch.form.kv_heads != self.form.kv_heads:
            raise _kept("the compressed branch has other heads than the selected one")
        return branch

    # -- the proofs
    def _prove(self, obligation: str, text: str, goal: Expr, given: Expr) -> None:
        self.proofs.append(self.prover.require(ReasonKind.SCORES, text, f"selection: {obligation}", goal, given))

    def _forced(self, cases: _Cases) -> tuple[int, int]:
        """How many first and last blocks are forced, as the last query sees it."""
        forced = x.disj(*cases.forced)
        last = self.r.sizes.hint(self.form.sizes[2]) - 1
        values = dict.fromkeys(forced.free, 0) | {x.as_var(self.form.i): last}

        def holds(block: int) -> bool:
            try:
                return bool(at_point(forced, {**values, x.as_var(self.block): block}, self.r.sizes.hints))
            except DataDependent:
                raise _kept("which blocks are forced depends on data") from None

        own = last // self.block_size
        n_init = next((j for j in range(own + 1) if not holds(j)), own + 1)
        if n_init == own + 1:
            raise _kept("every block is forced")
        return n_init, next(j for j in range(own + 1) if not holds(own - j))

    def _prove_cases(self, cases: _Cases, forced: Expr, n_init: int) -> None:
        own_row = x.disj(*cases.forced)
        early = x.less(self.block, x.integer(n_init))
        self._prove(
            "forced blocks", "the forced blocks are not the first and the last of a query",
            x.conj(x.implies(self.eligible, x.iff(own_row, forced)), x.implies(own_row, x.disj(self.eligible, early))), x.TRUE,
        )  # fmt: skip
        self._prove(
            "excluded blocks", "a block that the query sees is left out of the ranking",
            x.disj(x.negate(self.eligible), forced), x.disj(*cases.excluded),
        )  # fmt: skip

    def _key(self, branch: Match) -> Expr:
        return x.var("ranking.key", branch.form.width)

    def _seen(self, branch: Match, key: Expr) -> Expr:
        """Whether the query sees a compressed key."""
        p = branch.candidate.parameters
        position = x.plus(x.times(x.minus(key, p["prefix"]), p["stride"]), p["last"])
        return x.disj(x.less(key, x.integer(p["prefix"])), x.at_least(self.form.i, position))

    def _overlap(self, cases: _Cases, branch: Match) -> int:
        """The kernel size under which the scores are the op's, up to a factor."""
        p, key = branch.candidate.parameters, self._key(branch)
        weight = self._weight(cases.shares, branch, key)
        stride, size = p["stride"], self.block_size
        begin = x.times(x.minus(key, p["prefix"]), stride)
        for kernel_size in dict.fromkeys((p["last"] + 1, p["last"], stride, 2 * stride, size)):
            shared = _overlap(begin, kernel_size, x.times(self.block, size), size)
            shared = x.select(x.less(key, x.integer(p["prefix"])), x.ZERO, shared)
            ratio = self._ratio(weight, shared, key)
            if ratio is None:
                continue
            theirs, ours = ratio
            goal = x.equal(x.times(weight, ours), x.times(shared, theirs))
            given = x.conj(x.disj(*cases.scored), self.eligible, self._seen(branch, key))
            self._prove("weights", OTHER_WEIGHTS, goal, given)
            return kernel_size
        raise _kept(OTHER_WEIGHTS)

    def _weight(self, shares: Sequence[_Share], branch: Match, key: Expr) -> Expr:
        """How often the probability of a compressed key counts in the score of the block, as an integer up to a factor."""
        unit = min(abs(s.factor) for s in shares)
        total = x.ZERO
        for s in shares:
            times = round(s.factor / unit)
            if s.factor <= 0 or abs(s.factor / unit - times) > 1e-6:
                raise _kept("probabilities are weighted by numbers of no common measure")
            for given, count in self._of_key(s, branch, key):
                total = x.plus(total, x.select(given, x.times(count, times), x.ZERO))
        return total

    def _of_key(self, s: _Share, branch: Match, key: Expr) -> Iterator[tuple[Expr, Expr]]:
        """When, and how often, a share takes the probability of `key` of each query head of the group."""
        form, axis = branch.form, self.r.softmax_axis(self.r.nodes[s.softmax])[1]
        for member in s.bound if form.groups > 1 else (x.ZERO,):
            whole = form.groups == 1 or x.constant(member.args[1]) == form.groups
            mapping = {
                x.as_var(form.b): self.form.b, x.as_var(form.i): self.form.i,
                x.as_var(form.h): x.plus(x.times(self.head, form.groups), x.poly(member) if form.groups > 1 else x.ZERO),
            }  # fmt: skip
            mapping = {v: e for v, e in mapping.items() if v is not None}
            expected = [x.substitute(c, mapping) for k, c in enumerate(form.probability) if k != axis]
            read = [c for k, c in enumerate(s.at) if k != axis]
            if whole and expected == read and member not in s.at[axis].free | s.given.free | s.count.free:
                break
        else:
            raise _kept("the scores are not summed over the query heads of each group")
        offsets = [v for v in s.bound if v is not member]
        direct = next((v for v in offsets if x.poly(v) is s.at[axis]), None)
        first = {} if direct is None else {direct: key}
        rest = [v for v in offsets if v is not direct]
        if math.prod(v.args[1].hi for v in rest) > EXPANDED:
            raise _kept("the scores are a sum over too many offsets")
        for values in _points(rest):
            at = {**first, **values}
            inside = x.in_range(key, direct.args[1]) if direct is not None else x.TRUE
            given = x.conj(x.substitute(s.given, at), x.equal(x.substitute(s.at[axis], at), key), inside)
            yield given, x.substitute(s.count, at)

    def _ratio(self, weight: Expr, shared: Expr, key: Expr) -> tuple[int, int] | None:
        """(weight, overlap) at some key and block where both are positive, if they agree around a block in the middle."""
        block = self.r.sizes.hint(self.count) // 2
        n = self.r.sizes.hint(self.form.sizes[2])
        width = self.r.sizes.hint(key.args[1][0][0].args[1]) if key.op == "sum" else 0
        values = dict.fromkeys((weight.free | shared.free), 0)
        values |= {x.as_var(self.block): block, x.as_var(self.form.i): n - 1}
        found: tuple[int, int] | None = None
        for c in range(width):
            point = {**values, x.as_var(key): c}
            try:
                a, b = (int(at_point(e, point, self.r.sizes.hints)) for e in (weight, shared))
            except DataDependent:
                raise _kept("how much a probability counts depends on data") from None
            if not b and not a:
                continue
            found = found or (a, b)
            if not a or not b or a * found[1] != b * found[0]:
                return None
        return found

    def _prove_ties(self, cases: _Cases, branch: Match, forced: Expr, kernel_size: int) -> None:
        p, key = branch.candidate.parameters, self._key(branch)
        scored = x.disj(*cases.scored)
        first = x.plus(x.floordiv(x.times(self.block, self.block_size), p["stride"]), p["prefix"])
        self._prove(
            "every block is scored", "a block that the query sees overlaps no compressed key that it sees, so its score is zero",
            x.conj(x.in_range(first, branch.form.width), self._seen(branch, first)),
            x.conj(self.eligible, x.negate(forced)),
        )  # fmt: skip
        begin = x.times(x.minus(key, p["prefix"]), p["stride"])
        shared = _overlap(begin, kernel_size, x.times(self.block, self.block_size), self.block_size)
        real = x.conj(x.less(x.ZERO, shared), x.at_least(key, x.integer(p["prefix"])), self._seen(branch, key))
        self._prove(
            "later blocks score zero", "a block after the query has a score", self.eligible, x.conj(scored, real),
        )  # fmt: skip
        safe = branch.empty_value in (None, "mean") or op_name(self.r.nodes[branch.form.softmax]) in SAFE
        if not safe and not all(s.zeroed for s in cases.shares):
            self._prove("no NaN", "the scores of a query that sees no compressed key are NaN", self.eligible, scored)

    def _added(self, single: Segment, cases: _Cases) -> bool:
        """Whether a single block beside the list never ranks among the picks that count."""
        low = x.substitute(x.disj(*cases.excluded), {x.as_var(self.block): single.entry})  # type: ignore[dict-item]
        given = x.conj(single.valid, x.in_range(single.entry, self.count))
        return single.valid is x.TRUE and isinstance(self.prover.prove("selection: added block", low, given), Proof)

    def _prove_list(self, forced: Expr, singles: Sequence[Segment]) -> None:
        """Slots that do not count hold blocks after the query, and single blocks beside the list are forced ones."""
        slot = x.as_var(self.picked[self.axis])
        pick = x.apply(self.top, self.picked, 0, self.count.hi - 1)
        valid = _of_finite_scores(self.valid)
        here = x.conj(x.equal(pick, self.block), self.eligible, x.in_range(self.block, self.count))
        assert slot is not None
        self._prove("all picks count", "a pick that the query sees is left out of the list", valid, here)
        for single in singles:
            entry = single.entry
            in_list = x.substitute(x.conj(self.eligible, forced), {x.as_var(self.block): entry})  # type: ignore[dict-item]
            self._prove("single blocks", "a block is added to the list", in_list, x.in_range(entry, self.count))


def _slot_of(pick: Expr, axis: int) -> Expr:
    """The slot of a top-k that an element of its indices stands in."""
    return pick.args[1][axis]


def _kept(text: str) -> Refusal:
    return Refusal(ReasonKind.SCORES, text)


def _overlap(begin: Expr, length: int, start: Expr, size: int) -> Expr:
    """How many tokens ``[begin, begin + length)`` and ``[start, start + size)`` share."""
    left = x.select(x.at_least(begin, start), begin, start)
    right = x.select(x.at_least(x.plus(start, size), x.plus(begin, length)), x.plus(begin, length), x.plus(start, size))
    return x.select(x.at_least(right, left), x.minus(right, left), x.ZERO)


def _points(variables: Sequence[Expr]) -> Iterator[dict[Expr, Expr]]:
    """All values of variables of constant ranges."""
    if not variables:
        yield {}
        return
    for rest in _points(variables[1:]):
        for value in range(int(variables[0].args[1].hi)):
            yield {variables[0]: x.integer(value), **rest}


def _int_cases(e: Expr, given: Expr = x.TRUE) -> Iterator[tuple[Expr, Expr]]:
    """The leaves of an integer case tree, each with its condition."""
    a = x.as_atom(e)
    if a is not None and a.op == "if_int":
        yield from _int_cases(a.args[1], x.conj(given, a.args[0]))
        yield from _int_cases(a.args[2], x.conj(given, x.negate(a.args[0])))
    else:
        yield given, e


def _sum_of_probabilities(e: Expr) -> tuple[float, list[_Share] | None]:
    """A leaf of the scores as a constant and shares of probabilities; None for the shares if it is something else."""
    if e.op == "const":
        return e.args[0], []
    if e.op == "add":
        parts = [_sum_of_probabilities(t) for t in e.args]
        if any(shares is None for _, shares in parts):
            return 0.0, None
        return sum(c for c, _ in parts), [s for _, shares in parts for s in shares or ()]
    shares = _shares(e)
    return 0.0, shares


def _shares(e: Expr, so_far: _Share = _Share("", ())) -> list[_Share] | None:
    """An expression that is linear in probabilities, taken apart; None if it is not."""
    if e.op == "const":
        return [] if e.args[0] == 0 else None
    if e.op == "softmax":
        return [replace(so_far, softmax=e.args[0], at=e.args[1])]
    if e.op == "scaled":
        return _shares(e.args[1], replace(so_far, factor=so_far.factor * e.args[0]))
    if e.op == "opaque" and e.args[0] == "nan_to_0":
        return _shares(e.args[1][0], replace(so_far, zeroed=True))
    if e.op == "if_real":
        parts = [
            _shares(t, replace(so_far, given=x.conj(so_far.given, g)))
            for g, t in ((e.args[0], e.args[1]), (x.negate(e.args[0]), e.args[2]))
        ]
    elif e.op == "add":
        parts = [_shares(t, so_far) for t in e.args]
    elif e.op == "dot" or e.op == "opaque" and e.args[0] == "mul":
        variables, factors = e.args if e.op == "dot" else ((), e.args[1])
        inner = replace(so_far, bound=(*so_far.bound, *variables))
        data = [f for f in factors if any(t.op == "softmax" for t in x.walk(f))]
        if len(data) != 1:
            return None
        weights = [inner]
        for f in factors:
            if f is not data[0]:
                weights = [w for before in weights for w in _weighted(before, f)]
        if any(w.factor != w.factor for w in weights):
            return None
        parts = [_shares(data[0], w) for w in weights]
    else:
        return None
    return None if any(p is None for p in parts) else [s for p in parts for s in p or ()]


def _weighted(share: _Share, factor: Expr) -> Iterator[_Share]:
    """A share times a number that coordinates decide; its factor is NaN if data do."""
    for given, leaf in x.cases(factor):
        number, count = (leaf.args if leaf.op == "scaled" else (1.0, leaf))
        condition = x.conj(share.given, given)
        if count.op == "const":
            if count.args[0]:
                yield replace(share, factor=share.factor * number * count.args[0], given=condition)
        elif count.op == "float":
            yield replace(share, factor=share.factor * number, count=x.times(share.count, count.args[0]), given=condition)
        else:
            yield replace(share, factor=math.nan)


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
