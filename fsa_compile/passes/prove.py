"""Discharging obligations: by normal form, else by z3, within a time budget for the graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..report import Counterexample, Proof, ReasonKind
from . import expr as x
from .evaluate import DataDependent, at_point
from .expr import Expr
from .facts import ground_facts
from .form_view import FormView
from .reader import Reader
from .refusal import Refusal
from .smt import Model, Unknown, satisfiable, solve

QUERY_MS = 1000
"""Longest single query; most take 1-3 ms."""


@dataclass
class Prover:
    """Proves formulas about one graph.

    Attributes:
        reader: Knows the top-k nodes and sizes.
        seconds: The graph's proof budget.
        spent: Seconds of it that are used.
    """

    reader: Reader
    seconds: float = 2.0
    spent: float = 0.0
    _sane: set[frozenset[Expr]] = field(default_factory=set)

    def prove(
        self, obligation: str, goal: Expr, given: Expr = x.TRUE, terms: Sequence[Expr] = (), facts: Sequence[Expr] = ()
    ) -> Proof | Model | Unknown:
        """A proof that `given` implies `goal` for all coordinates and data, or why there is none.

        Args:
            obligation: Its name, for the report.
            goal: What is to hold.
            given: Under which condition.
            terms: Slots at which memberships are introduced.
            facts: Further facts that hold.
        """
        start = time.perf_counter()
        try:
            if x.implies(given, goal) is x.TRUE:
                return Proof(obligation, "identity", 0.0)
            left = self.seconds - self.spent
            if left <= 0:
                return Unknown("the graph's proof budget is spent; raise options['proof_seconds']")
            hypotheses = [given, *facts, *self.reader.sizes.assumptions()]
            hypotheses += ground_facts(self.reader, [goal, *hypotheses], terms)
            answer = solve(hypotheses, goal, int(min(QUERY_MS, max(1.0, 1e3 * left))))
            if answer is not None:
                return answer
            known = frozenset(hypotheses)
            if known not in self._sane:
                # A proof from contradictory hypotheses would prove anything.
                if not satisfiable(hypotheses, QUERY_MS):
                    return Unknown("the hypotheses could not be shown to be consistent")
                self._sane.add(known)
            return Proof(obligation, "z3", round(1e3 * (time.perf_counter() - start), 2))
        finally:
            self.spent += time.perf_counter() - start

    def require(
        self,
        kind: ReasonKind,
        text: str,
        obligation: str,
        goal: Expr,
        given: Expr = x.TRUE,
        terms: Sequence[Expr] = (),
        facts: Sequence[Expr] = (),
        beyond: Expr | None = None,
    ) -> Proof:
        """`prove`, or raise a refusal of that kind.

        Args:
            kind, text: Of the refusal.
            obligation, goal, given, terms, facts: As in `prove`.
            beyond: The key of which the obligation speaks, where that is not the form's: one that the model never sees.

        Raises:
            Refusal: Of kind `kind` if there is a counterexample, UNDECIDED if the solver gave up.
        """
        answer = self.prove(obligation, goal, given, terms, facts)
        if isinstance(answer, Proof):
            return answer
        if isinstance(answer, Unknown):
            raise Refusal(ReasonKind.UNDECIDED, f"not decided in time ({obligation}): {answer.why}")
        raise Refused(kind, text, answer, beyond)


class Refused(Refusal):
    """A refusal with the model that the solver found; `counterexample_of` puts it into the user's terms."""

    def __init__(self, kind: ReasonKind, text: str, model: Model, beyond: Expr | None = None) -> None:
        super().__init__(kind, text)
        self.model, self.beyond = model, beyond


def counterexample_of(view: FormView, model: Model, op: str, beyond: Expr | None = None) -> Counterexample:
    """A solver model as query, key, head and batch row.

    Args:
        view: The form whose coordinates the model gives values to.
        model: The values.
        op: The rule that was tried.
        beyond: A key that the model does not see, if the counterexample is about one.
    """
    form = view.form

    def value(e: Expr) -> int:
        v = x.as_var(e)
        return model.values.get(v, 0) if v is not None else (x.constant(e) or 0)

    index = value(form.j)
    try:
        sees = beyond is None and view.sees(value(form.i), index)
    except Exception:  # data-dependent: the solver chose the data
        sees = True
    key = _position(view, model, index) if beyond is None else value(beyond)
    return Counterexample(
        query=value(form.i), key=key, model_sees=sees, op=op, head=value(form.h), batch=value(form.b)
    )


def _position(view: FormView, model: Model, index: int) -> int:
    """Where the key of that index stands, which is another number if keys are shifted; the index itself where data decide."""
    try:
        values = {v: model.values.get(v, 0) for v in view.form.key.free}
        return int(at_point(view.form.key, values, view.reader.sizes.hints))
    except DataDependent:
        return index
