"""Tensor sizes as integer expressions: constants stay constants, dynamic sizes become size symbols.

A `SymInt` is read through its symbolic expression, never through ``int()``, which would add a guard and a recompile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from . import expr as x
from .evaluate import at_point
from .expr import Expr

UNBACKED = 4096
"""Stands in for a size that is only known at run time."""


class Sizes:
    """Translates the sizes of one graph and remembers a concrete hint for every symbol.

    Args:
        assumed: Equalities that are taken to be guarded: whoever relies on what follows from them must add these guards.

    Attributes:
        wanted: Equalities that hold for the inputs of this compilation and that no guard states: what would have to be assumed
            for a proof to go on.
    """

    def __init__(self, assumed: Sequence[sympy.Eq] = ()) -> None:
        self.assumed = tuple(assumed)
        self.wanted: dict[sympy.Eq, None] = {}
        self.hints: dict[str, int] = {}
        self.symbols: dict[str, Any] = {}
        self._memo: dict[Any, Expr] = {}
        self._unbacked: set[str] = set()
        self._env: Any = None
        self._assumptions: list[Expr] | None = None
        self._equal: dict[Any, Any] | None = None

    def of(self, size: int | torch.SymInt) -> Expr:
        """`size` as an integer expression."""
        if isinstance(size, int):
            return x.integer(size)
        node = size.node
        self._env = node.shape_env
        return self._translate(node.expr)

    def shape(self, t: torch.Tensor) -> tuple[Expr, ...]:
        """The shape of a (fake) tensor."""
        return tuple(self.of(s) for s in t.shape)

    def hint(self, e: Expr) -> int:
        """A concrete value of a size expression: what it was when the graph was traced."""
        return int(at_point(e, {}, self.hints))

    def known(self, e: Expr) -> bool:
        """Whether a size is a number of the shapes that go in; others, such as how many elements are nonzero, data decide."""
        return not any(t.op == "size" and str(t.args[0]) in self._unbacked for t in x.walk(e))

    def want_number(self, size: Expr) -> None:
        """Note that `size` would have to be a number: the one it is now."""
        if x.constant(size) is None and self.known(size):
            self._want(size, x.integer(self.hint(size)))

    def want_equal(self, a: Expr, b: Expr) -> None:
        """Note that two dynamic sizes would have to be equal, if they are that now."""
        dynamic = all(x.constant(e) is None and self.known(e) for e in (a, b))
        if dynamic and a is not b and self.hint(a) == self.hint(b):
            self._want(a, b)

    def _want(self, a: Expr, b: Expr) -> None:
        relation = self._symint(a) == self._symint(b)
        if isinstance(relation, torch.SymBool) and isinstance(relation.node.expr, sympy.Eq):
            sides = relation.node.expr.args
            smallest = [s for s in sides if type(s).__name__ == "Min"]
            if any(other.is_number and other not in s.args for s in smallest for other in sides):
                return  # the number of blocks, where that is smaller than the top-k: another one at each length
            one_number = any(s.is_number for s in sides) and not smallest
            if not relation.node.expr.free_symbols & self._kept_dynamic(one_number):
                self.wanted[relation.node.expr] = None

    def _symint(self, e: Expr) -> Any:
        """A size expression as the integer that the graph has."""
        values = {}
        for t in x.walk(e):
            if t.op == "size":
                s, c = self.symbols[t.args[0]]
                value = self._env.create_symintnode(s, hint=int(self._value(s)))
                values[t.args[0]] = value // c if c > 1 else value
        return at_point(e, {}, values)

    def _kept_dynamic(self, one_number: bool) -> set[Any]:
        """The symbols of sizes that the user has marked dynamic: where a guard makes one a single number Dynamo raises, and where
        bounds are given with the mark it does at any guard."""
        kept: set[Any] = set()
        for tracked in self._env.tracked_fakes or ():
            constraints = getattr(tracked.symbolic_context, "constraint_sizes", ())
            for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints):
                strict = constraint is not None and not constraint.warn_only and (one_number or hasattr(constraint, "vr"))
                if strict and isinstance(size, torch.SymInt):
                    kept |= size.node.expr.free_symbols
        return kept

    def guard(self, relations: Sequence[sympy.Eq]) -> None:
        """Have Dynamo compile again where one of these does not hold."""
        for relation in relations:
            self._env.evaluate_expr(relation)

    def _relations(self) -> list[Any]:
        return [self._reduced(e) for e in (*(g.expr for g in self._env.guards), *self.assumed)]

    def _reduced(self, relation: Any) -> Any:
        """An equality of products without the positive factors that both have: sizes of views come so."""
        if not isinstance(relation, sympy.Eq) or any(side.is_Add for side in relation.args):
            return relation
        a, b = (side.as_powers_dict() for side in relation.args)
        shared = [s ** min(a[s], b[s]) for s in a if s.is_Symbol and s in b and self._env.bound_sympy(s).lower >= 1]
        numbers = [side.as_coeff_Mul()[0] for side in relation.args]
        number = math.gcd(*map(int, numbers)) if all(c.is_Integer for c in numbers) else 1
        by = sympy.prod(shared) * max(number, 1)
        return sympy.Eq(*(side / by for side in relation.args), evaluate=False) if by != 1 else relation

    def assumptions(self) -> list[Expr]:
        """What Dynamo has guarded about sizes, such as divisibility: it holds whenever the compiled code runs."""
        if self._env is None:
            return []
        if self._assumptions is None:
            relations = self._relations()
            formulas = [self._relation(s) for s in relations if isinstance(s, sympy.core.relational.Relational)]
            formulas += [self._within(s) for s in self._equalities() if s.is_Symbol]
            self._assumptions = [f for f in formulas if f is not x.TRUE]
        return self._assumptions

    def _relation(self, s: Any) -> Expr:
        if not all(a.is_integer for a in s.args):
            return x.TRUE
        a, b = map(self._translate, s.args)
        if isinstance(s, sympy.Eq):
            # What is the smallest of some sizes is at most each of them.
            smallest = [t.args for t in s.args if type(t).__name__ == "Min"]
            return x.conj(x.equal(a, b), *(x.at_least(self._translate(t), a) for terms in smallest for t in terms))
        if isinstance(s, sympy.Ne):
            return x.negate(x.equal(a, b))
        if isinstance(s, sympy.Ge):
            return x.at_least(a, b)
        if isinstance(s, sympy.Gt):
            return x.less(b, a)
        return x.at_least(b, a) if isinstance(s, sympy.Le) else x.less(a, b) if isinstance(s, sympy.Lt) else x.TRUE

    def _within(self, s: Any) -> Expr:
        """The bounds of a symbol that another expression stands for."""
        bounds, e = self._env.bound_sympy(s), self._translate(s)
        lo, hi = _bound(bounds.lower), _bound(bounds.upper)
        above = x.TRUE if math.isinf(lo) else x.at_least(e, x.integer(int(lo)))
        return above if math.isinf(hi) else x.conj(above, x.at_least(x.integer(int(hi)), e))

    def _equalities(self) -> dict[Any, Any]:
        """What guards make equal to something else, so that keys and values of inputs with lengths of their own have one length:
        ``s2 == 4 * (s1 // 4)`` where both are made of ``s1 // 4`` blocks, ``s1 // 4 == s2 // 4`` where they are pooled."""
        if self._equal is None:
            self._equal = {}
            for relation in [e for e in self._relations() if isinstance(e, sympy.Eq)]:
                a, b = (self._env.replace(e).xreplace(self._equal) for e in relation.args)
                old, new = (a, b) if a.is_Symbol or not (b.is_Symbol or a.is_number) else (b, a)
                if new.is_number and not old.is_number:
                    usable = old.is_Symbol or type(old).__name__ == "Min"
                else:
                    usable = not (old.is_number or old.has(new) or new.has(old))
                if usable:
                    self._equal = {s: e.xreplace({old: new}) for s, e in self._equal.items()} | {old: new}
        return self._equal

    def _translate(self, s: Any) -> Expr:
        r = self._memo.get(s)
        if r is None:
            r = self._memo[s] = self._translate_new(s.xreplace(self._equalities()))
        return r

    def _translate_new(self, s: Any) -> Expr:
        if s.is_Integer:
            return x.integer(int(s))
        if isinstance(s, sympy.Add):
            out = x.ZERO
            for a in s.args:
                out = x.plus(out, self._translate(a))
            return out
        if isinstance(s, sympy.Mul) and all(not a.is_Rational or a.is_Integer for a in s.args):
            out = x.ONE
            for a in s.args:
                out = x.times(out, self._translate(a))
            return out
        if s.is_Pow and s.exp.is_Integer and s.exp > 0:
            return functools.reduce(x.times, [self._translate(s.base)] * int(s.exp))
        name = type(s).__name__
        if name in ("Max", "Min"):
            left = [t for t in s.args if not any(self._decided(t, u, name == "Max") for u in s.args if u is not t)]
            if len(left) == 1:
                return self._translate(left[0])
        if name in ("FloorDiv", "CleanDiv") and s.args[1].is_Integer and s.args[1] > 0 and s.args[0].could_extract_minus_sign():
            c = int(s.args[1])  # -(-n // c) is how Python rounds up, and so is (n + c - 1) // c
            return x.times(x.floordiv(x.plus(self._translate(-s.args[0]), c - 1), c), -1)
        if name in ("FloorDiv", "CleanDiv") and self._positive(s.args[1]):
            return x.floordiv(self._translate(s.args[0]), self._translate(s.args[1]))
        if name in ("Mod", "PythonMod") and self._positive(s.args[1]):
            return x.mod(self._translate(s.args[0]), self._translate(s.args[1]))
        # A plain symbol, or a function of symbols that the language has no word for: an opaque size. One that Dynamo has
        # guarded to be a multiple of c is written c * (s/c), so that blocks of c tokens come out even.
        bounds, c = self._env.bound_sympy(s), self._divisor(s)
        symbol = str(s) if c == 1 else f"{s}/{c}"
        self.symbols[symbol] = (s, c)
        lo, hi = _bound(bounds.lower), _bound(bounds.upper)
        value = self._value(s)
        if value.free_symbols:
            self._unbacked.add(symbol)
        # Without a hint (unbacked) any value does: hints steer proposals, proofs never see them.
        self.hints[symbol] = (int(value) if value.is_Integer else max(UNBACKED, 0 if math.isinf(lo) else int(lo))) // c
        if not math.isinf(lo):
            lo = -(-lo // c)
        if not math.isinf(hi):  # inf // c is NaN
            hi = hi // c
        return x.times(x.size_symbol(symbol, lo, hi), c)

    def _value(self, s: Any) -> Any:
        """What `s` was when the graph was traced; without a hint (unbacked) symbols are left in it."""
        values = self._env.backed_var_to_val if hasattr(self._env, "backed_var_to_val") else self._env.var_to_val
        return s.xreplace(values)

    def _divisor(self, s: Any) -> int:
        """The largest number that guards say divides the symbol `s`."""
        c = 1
        for relation in [e.xreplace(self._equalities()) for e in self._relations()] if s.is_Symbol else []:
            for a, b in (relation.args, relation.args[::-1]) if isinstance(relation, sympy.Eq) else ():
                c = math.lcm(c, _even(s, a, b))
        return c

    def _decided(self, a: Any, b: Any, largest: bool) -> bool:
        """Whether `b` is known to be at least `a`, or, of the smallest, at most: by its bounds, or because a guard says so."""
        low, high = (a, b) if largest else (b, a)
        if x.minus(self._translate(high), self._translate(low)).lo >= 0:
            return True
        gaps = [_gap(e.xreplace(self._equalities())) for e in self._relations()]
        rests = [high - low - gap for gap in gaps if gap is not None]
        return any(rest.is_number and rest >= 0 for rest in rests)

    def _positive(self, s: Any) -> bool:
        return self._translate(s).lo > 0


def _even(s: Any, a: Any, b: Any) -> int:
    """The number that divides `s` where ``a == b`` says so: as ``s % c == 0``, or as s being a multiple of c, such as
    ``s == c * (s // c)`` or ``s == -c * (-s // c)``; 1 where it does not."""
    if b == 0 and type(a).__name__ in ("Mod", "PythonMod") and a.args[0] == s:
        c = a.args[1]
    elif a == s:
        c, other = b.as_coeff_Mul()
        if not all(t.is_integer for t in (other.args if type(other).__name__ in ("Max", "Min") else (other,))):
            return 1
    else:
        return 1
    return abs(int(c)) if c.is_Integer and c != 0 else 1


def _gap(relation: Any) -> Any:
    """What an inequality says is not negative."""
    if not isinstance(relation, sympy.core.relational.Relational) or isinstance(relation, (sympy.Eq, sympy.Ne)):
        return None
    return relation.gts - relation.lts - (1 if isinstance(relation, (sympy.Gt, sympy.Lt)) else 0)


def _bound(b: Any) -> float:
    try:
        v = float(b)
    except (TypeError, ValueError):  # int_oo and friends
        return math.inf if str(b).startswith("int_oo") else -math.inf
    return v if math.isinf(v) or abs(v) > 2**62 else int(v)
