"""Expressions as z3 terms, for the obligations that the normal form does not settle.

Every query is free of quantifiers. An ``exists`` is lambda-lifted to an uninterpreted predicate over its integer
sub-terms that are free of the bound variable, so that two occurrences share a symbol; what is known of it is added as
ground facts by `facts.py`. Real data are uninterpreted functions of their coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import z3

from . import expr as x
from .expr import Expr

# Infinity as a large number: no finite datum reaches it, and a datum that is infinite may equal it.
_HUGE = z3.RealVal("1" + "0" * 400)


@dataclass(frozen=True)
class Model:
    """A counterexample: integer values for the variables that the solver was asked about."""

    values: dict[Expr, int]


@dataclass(frozen=True)
class Unknown:
    """The solver gave up: `why` is its reason."""

    why: str


class Translator:
    """One z3 context-free translation: terms are memoised, bounds are collected in `bounds`."""

    def __init__(self) -> None:
        self.bounds: list[z3.BoolRef] = []
        self._terms: dict[Expr, Any] = {}
        self._functions: dict[tuple, z3.FuncDeclRef] = {}

    def function(self, key: tuple, arity: int, sort: z3.SortRef) -> z3.FuncDeclRef:
        """The uninterpreted function for `key`: one symbol for each distinct structure."""
        k = (key, arity, str(sort))
        if k not in self._functions:
            self._functions[k] = z3.Function(f"f{len(self._functions)}", *[z3.IntSort()] * arity, sort)
        return self._functions[k]

    def call(self, key: tuple, args: Iterable[Expr], sort: z3.SortRef) -> Any:
        terms = [self.term(a) for a in args]
        f = self.function(key, len(terms), sort)
        return f(*terms)

    def term(self, e: Expr) -> Any:
        t = self._terms.get(e)
        if t is None:
            t = self._terms[e] = getattr(self, "_" + e.op)(e)
        return t

    # integers
    def _sum(self, e: Expr) -> Any:
        parts = [self.term(a) * k if k != 1 else self.term(a) for a, k in e.args[1]]
        if e.args[0] or not parts:
            parts.append(z3.IntVal(e.args[0]))
        return z3.Sum(parts) if len(parts) > 1 else parts[0]

    def _bounded(self, t: Any, lo: float, hi: float) -> Any:
        if lo > -math.inf:
            self.bounds.append(t >= int(lo))
        if hi < math.inf:
            self.bounds.append(t <= int(hi))
        return t

    def _var(self, e: Expr) -> Any:
        t = z3.Int(f"{e.args[0]}!{e.id}")
        self.bounds += [t >= 0, t < self.term(e.args[1])]
        return t

    def _size(self, e: Expr) -> Any:
        return self._bounded(z3.Int(e.args[0]), e.lo, e.hi)

    def _prod(self, e: Expr) -> Any:
        t = self.term(e.args[0][0])
        for f in e.args[0][1:]:
            t = t * self.term(f)
        return t

    def _div(self, e: Expr) -> Any:
        return self.term(e.args[0]) / self.term(e.args[1])

    def _mod(self, e: Expr) -> Any:
        return self.term(e.args[0]) % self.term(e.args[1])

    def _if_int(self, e: Expr) -> Any:
        return z3.If(*map(self.term, e.args))

    def _apply(self, e: Expr) -> Any:
        return self._bounded(self.call(("apply", e.args[0]), e.args[1], z3.IntSort()), e.lo, e.hi)

    # formulas
    def _true(self, e: Expr) -> Any:
        return z3.BoolVal(True)

    def _false(self, e: Expr) -> Any:
        return z3.BoolVal(False)

    def _not(self, e: Expr) -> Any:
        return z3.Not(self.term(e.args[0]))

    def _and(self, e: Expr) -> Any:
        return z3.And([self.term(a) for a in e.args])

    def _or(self, e: Expr) -> Any:
        return z3.Or([self.term(a) for a in e.args])

    def _ge(self, e: Expr) -> Any:
        return self.term(e.args[0]) >= 0

    def _eq(self, e: Expr) -> Any:
        return self.term(e.args[0]) == 0

    def _predicate(self, e: Expr) -> Any:
        key, args = closure(e)
        return self.call(key, args, z3.BoolSort())

    def _exists(self, e: Expr) -> Any:
        key, args = closure(e)
        return self.call(key, args, z3.BoolSort())

    def _compare(self, e: Expr) -> Any:
        op, a, b = e.args
        p, q = self.real(a), self.real(b)
        return p == q if op == "eq" else p > q if op == "gt" else p >= q

    # reals
    def real(self, e: Expr) -> Any:
        if e.op == "const":
            v = e.args[0]
            if math.isinf(v):
                return _HUGE if v > 0 else -_HUGE
            return z3.RealVal(repr(v))
        if e.op == "float":
            return z3.ToReal(self.term(e.args[0]))
        key, args = closure(e)
        t = self.call(key, args, z3.RealSort())
        self.bounds += [t >= -_HUGE, t <= _HUGE]
        return t


def closure(e: Expr) -> tuple[tuple, list[Expr]]:
    """Lambda-lift: the structure of `e`, and its maximal integer sub-terms that are free of variables bound in it."""
    args: list[Expr] = []

    def hole(t: Expr) -> tuple:
        c = x.constant(t)
        if c is not None:
            return ("int", c)
        if t not in args:
            args.append(t)
        return ("arg", args.index(t))

    def go(t: Any, bound: frozenset[Expr]) -> Any:
        if isinstance(t, tuple):
            return tuple(go(y, bound) for y in t)
        if not isinstance(t, Expr):
            return t
        if t.sort == x.INT and not (t.free & bound):
            return hole(t if t.op == "sum" else x.poly(t))
        if t.op == "var":
            return ("bound", t.id)
        if t.op == "sum":  # the part of a sum without bound variables is one argument
            rest = x.plus(x.integer(t.args[0]), x.ZERO)
            inner = []
            for a, k in t.args[1]:
                if a.free & bound:
                    inner.append((k, go(a, bound)))
                else:
                    rest = x.plus(rest, x.times(x.poly(a), k))
            return ("sum", hole(rest), tuple(inner))
        if t.op == "exists":
            return ("exists", t.args[0].id, go(t.args[1], bound | {t.args[0]}))
        if t.op == "dot":
            inner_bound = bound | set(t.args[0])
            return ("dot", tuple(v.id for v in t.args[0]), go(t.args[1], inner_bound))
        return (t.op, *(go(a, bound) for a in t.args))

    return go(e, frozenset()), args


def solve(hypotheses: Iterable[Expr], refuted: Expr, timeout_ms: int) -> Model | Unknown | None:
    """A model of the hypotheses in which `refuted` is false; None if there is none (it is proven).

    Args:
        hypotheses: Formulas taken to hold.
        refuted: The goal.
        timeout_ms: Solver time in milliseconds.
    """
    tr = Translator()
    terms = [tr.term(h) for h in hypotheses] + [z3.Not(tr.term(refuted))]
    solver = z3.Solver()
    solver.set("timeout", int(timeout_ms))
    solver.add(*terms, *tr.bounds)
    verdict = solver.check()
    if verdict == z3.unsat:
        return None
    if verdict == z3.unknown:
        return Unknown(solver.reason_unknown())
    model = solver.model()
    free = refuted.free.union(*(h.free for h in hypotheses)) if hypotheses else refuted.free
    return Model({v: model.eval(tr.term(v), True).as_long() for v in free})


def satisfiable(hypotheses: Iterable[Expr], timeout_ms: int) -> bool:
    """Whether the hypotheses have a model at all: a proof from contradictory ones proves nothing."""
    return isinstance(solve(list(hypotheses), x.FALSE, timeout_ms), Model)
