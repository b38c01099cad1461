"""Tensor sizes as integer expressions: constants stay constants, dynamic sizes become size symbols.

A `SymInt` is read through its symbolic expression, never through ``int()``, which would add a guard and a recompile.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from . import expr as x
from .expr import Expr

UNBACKED = 4096
"""Stands in for a size that is only known at run time."""


class Sizes:
    """Translates the sizes of one graph and remembers a concrete hint for every symbol."""

    def __init__(self) -> None:
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
        from .evaluate import at_point

        return int(at_point(e, {}, self.hints))

    def known(self, e: Expr) -> bool:
        """Whether a size is a number of the shapes that go in; others, such as how many elements are nonzero, data decide."""
        return not any(t.op == "size" and str(t.args[0]) in self._unbacked for t in x.walk(e))

    def assumptions(self) -> list[Expr]:
        """What Dynamo has guarded about sizes, such as divisibility: it holds whenever the compiled code runs."""
        if self._env is None:
            return []
        if self._assumptions is None:
            relations = [g.expr for g in self._env.guards]
            formulas = [self._relation(s) for s in relations if isinstance(s, sympy.core.relational.Relational)]
            formulas += [self._within(s) for s in self._equalities() if s.is_Symbol]
            self._assumptions = [f for f in formulas if f is not x.TRUE]
        return self._assumptions

    def _relation(self, s: Any) -> Expr:
        if not all(a.is_integer for a in s.args):
            return x.TRUE
        a, b = map(self._translate, s.args)
        if isinstance(s, sympy.Eq):
            return x.equal(a, b)
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
            for relation in [g.expr for g in self._env.guards if isinstance(g.expr, sympy.Eq)]:
                a, b = (self._env.replace(e).xreplace(self._equal) for e in relation.args)
                old, new = (a, b) if a.is_Symbol or not b.is_Symbol else (b, a)
                if not (old.is_number or new.is_number or old.has(new) or new.has(old)):
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
        name = type(s).__name__
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
        values = self._env.backed_var_to_val if hasattr(self._env, "backed_var_to_val") else self._env.var_to_val
        value = s.xreplace(values)
        if value.free_symbols:
            self._unbacked.add(symbol)
        # Without a hint (unbacked) any value does: hints steer proposals, proofs never see them.
        self.hints[symbol] = (int(value) if value.is_Integer else max(UNBACKED, 0 if math.isinf(lo) else int(lo))) // c
        if not math.isinf(lo):
            lo = -(-lo // c)
        if not math.isinf(hi):  # inf // c is NaN
            hi = hi // c
        return x.times(x.size_symbol(symbol, lo, hi), c)

    def _divisor(self, s: Any) -> int:
        """The largest number that guards say divides the symbol `s`."""
        c = 1
        for relation in [g.expr.xreplace(self._equalities()) for g in self._env.guards] if s.is_Symbol else []:
            for a, b in (relation.args, relation.args[::-1]) if isinstance(relation, sympy.Eq) else ():
                c = math.lcm(c, _even(s, a, b))
        return c

    def _positive(self, s: Any) -> bool:
        return self._translate(s).lo > 0


def _even(s: Any, a: Any, b: Any) -> int:
    """The number that divides `s` where ``a == b`` says so: as ``s % c == 0`` or as ``s == c * (s // c)``; 1 where it does not."""
    if b == 0 and type(a).__name__ in ("Mod", "PythonMod") and a.args[0] == s:
        c = a.args[1]
    elif a == s:
        c, quotient = b.as_coeff_Mul()
        if type(quotient).__name__ not in ("FloorDiv", "CleanDiv") or quotient.args != (s, c):
            return 1
    else:
        return 1
    return int(c) if c.is_Integer else 1


def _bound(b: Any) -> float:
    try:
        v = float(b)
    except (TypeError, ValueError):  # int_oo and friends
        return math.inf if str(b).startswith("int_oo") else -math.inf
    return v if math.isinf(v) or abs(v) > 2**62 else int(v)
