"""The expression language that lifting speaks: what an element of a tensor is, as a function of its coordinates.

Three sorts:

* ``INT``: polynomials over *atoms* (variables, size symbols, quotients, remainders, uninterpreted applications,
  conditionals). Kept in a normal form in which a reshape and its inverse cancel.
* ``BOOL``: formulas over comparisons of integers, comparisons of reals, opaque predicates and ``exists``.
* ``REAL``: a case tree over formulas, with leaves constant, load, dot product, softmax, scaled, sum.

Expressions are hash-consed: two expressions are equal in normal form iff they are the same object, so head maps and key
maps are compared with ``is``. Tensors are referred to by the *name* of their graph node; nothing here holds a graph.

Sizes are integer expressions too: a constant, or a polynomial over size symbols when the sequence length is dynamic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

INF = math.inf
INT, BOOL, REAL = "int", "bool", "real"


class Expr:
    """One hash-consed node. Build it with the functions of this module, never directly.

    Attributes:
        op: What it is: ``"sum"``, ``"var"``, ``"div"``, ``"and"``, ``"load"``, ...
        args: Operands: expressions, tuples of expressions, names, numbers.
        sort: ``INT``, ``BOOL`` or ``REAL``.
        lo, hi: Bounds of an integer expression (possibly infinite).
        free: The free variables (size symbols excluded).
    """

    __slots__ = ("op", "args", "sort", "lo", "hi", "id", "free", "__weakref__")
    op: str
    args: tuple
    sort: str
    lo: float
    hi: float
    id: int
    free: frozenset[Expr]

    def __repr__(self) -> str:
        return show(self)


_table: WeakValueDictionary[tuple, Expr] = WeakValueDictionary()
_ids = itertools.count()


def _key(x: Any) -> Any:
    if isinstance(x, Expr):
        return x.id
    if isinstance(x, tuple):
        return tuple(map(_key, x))
    return type(x).__name__, x


def _make(op: str, args: tuple, sort: str, lo: float = -INF, hi: float = INF) -> Expr:
    key = (op, sort, _key(args))
    e = _table.get(key)
    if e is None:
        e = Expr()
        e.op, e.args, e.sort, e.lo, e.hi, e.id = op, args, sort, lo, hi, next(_ids)
        if op == "var":
            e.free = frozenset((e,))
        else:
            e.free = frozenset().union(*(c.free for c in children(e))) if args else frozenset()
            if op == "exists":
                e.free -= {args[0]}
            elif op == "dot":
                e.free -= set(args[0])
        _table[key] = e
    return e


def children(e: Expr) -> list[Expr]:
    """The direct sub-expressions."""
    if e.op == "sum":
        return [a for a, _ in e.args[1]]
    out: list[Expr] = []
    for a in e.args:
        if isinstance(a, Expr):
            out.append(a)
        elif isinstance(a, tuple):
            out.extend(x for x in a if isinstance(x, Expr))
    return out


def walk(e: Expr) -> Iterator[Expr]:
    """Every distinct sub-expression of `e`, `e` first."""
    seen, todo = {e}, [e]
    while todo:
        x = todo.pop()
        yield x
        for c in children(x):
            if c not in seen:
                seen.add(c)
                todo.append(c)


# ---------------------------------------------------------------------------------------------- integers


def _sum(constant: int, terms: Iterable[tuple[Expr, int]]) -> Expr:
    """``constant + sum(coefficient * atom)``, in normal form."""
    acc: dict[Expr, int] = {}
    for atom, k in terms:
        acc[atom] = acc.get(atom, 0) + k
    constant, acc = _fuse_quotient_remainder(constant, {a: k for a, k in acc.items() if k})
    ordered = tuple(sorted(acc.items(), key=lambda t: t[0].id))
    lo = hi = constant
    for a, k in ordered:
        lo += k * a.lo if k > 0 else k * a.hi
        hi += k * a.hi if k > 0 else k * a.lo
    return _make("sum", (constant, ordered), INT, lo, hi)


def _fuse_quotient_remainder(constant: int, acc: dict[Expr, int]) -> tuple[int, dict[Expr, int]]:
    """``k*m*(x // m) + k*(x % m)`` is ``k*x``: the step that makes a reshape cancel its inverse."""
    again = True
    while again:
        again = False
        for rem, k in list(acc.items()):
            if rem.op != "mod":
                continue
            x, m = rem.args
            quotient = times(floordiv(x, m), m)
            if quotient.args[0] or not quotient.args[1]:
                continue
            if all(acc.get(a) == k * c for a, c in quotient.args[1]):
                del acc[rem]
                for a, _ in quotient.args[1]:
                    del acc[a]
                constant += k * x.args[0]
                for a, c in x.args[1]:
                    acc[a] = acc.get(a, 0) + k * c
                acc = {a: c for a, c in acc.items() if c}
                again = True
                break
    return constant, acc


def integer(c: int) -> Expr:
    """The constant `c`."""
    return _sum(int(c), ())


ZERO, ONE = integer(0), integer(1)


def _poly(atom: Expr) -> Expr:
    return _sum(0, ((atom, 1),))


def var(name: str, size: Expr | int) -> Expr:
    """A coordinate: ``0 <= name < size``."""
    size = integer(size) if isinstance(size, int) else size
    return _poly(_make("var", (name, size), INT, 0, max(size.hi - 1, 0)))


def size_symbol(name: str, lo: float, hi: float) -> Expr:
    """A symbolic size with ``lo <= name <= hi``; free of coordinates, the same at run time for the whole graph."""
    return _poly(_make("size", (name,), INT, max(lo, 0), hi))


def apply(name: str, args: Iterable[Expr], lo: float = -INF, hi: float = INF) -> Expr:
    """An uninterpreted integer: element `args` of the data-dependent tensor `name`, within ``[lo, hi]``."""
    return _poly(_make("apply", (name, tuple(args)), INT, lo, hi))


def as_var(e: Expr) -> Expr | None:
    """The variable that `e` is, or None if it is anything else."""
    a = as_atom(e)
    return a if a is not None and a.op == "var" else None


def as_atom(e: Expr) -> Expr | None:
    """The single atom that the polynomial `e` is, or None."""
    if e.op == "sum" and e.args[0] == 0 and len(e.args[1]) == 1 and e.args[1][0][1] == 1:
        return e.args[1][0][0]
    return None


def poly(atom: Expr) -> Expr:
    """The polynomial of a single atom (the inverse of `as_atom`)."""
    return _poly(atom)


def constant(e: Expr) -> int | None:
    """The value of a constant integer, or None."""
    return e.args[0] if e.op == "sum" and not e.args[1] else None


def plus(a: Expr, b: Expr | int) -> Expr:
    if isinstance(b, int):
        return _sum(a.args[0] + b, a.args[1])
    return _sum(a.args[0] + b.args[0], a.args[1] + b.args[1])


def minus(a: Expr, b: Expr | int) -> Expr:
    return plus(a, -b) if isinstance(b, int) else plus(a, times(b, -1))


def times(a: Expr, b: Expr | int) -> Expr:
    """The product; products of atoms are kept as sorted monomials."""
    if isinstance(b, int):
        return _sum(a.args[0] * b, tuple((x, k * b) for x, k in a.args[1]))
    ca, cb = constant(a), constant(b)
    if cb is not None:
        return times(a, cb)
    if ca is not None:
        return times(b, ca)
    terms: list[tuple[Expr, int]] = []
    if a.args[0]:
        terms += [(y, k * a.args[0]) for y, k in b.args[1]]
    if b.args[0]:
        terms += [(x, k * b.args[0]) for x, k in a.args[1]]
    for x, j in a.args[1]:
        for y, k in b.args[1]:
            terms.append((_monomial(_factors(x) + _factors(y)), j * k))
    return _sum(a.args[0] * b.args[0], terms)


def _factors(atom: Expr) -> tuple[Expr, ...]:
    return atom.args[0] if atom.op == "prod" else (atom,)


def _monomial(factors: tuple[Expr, ...]) -> Expr:
    if len(factors) == 1:
        return factors[0]
    factors = tuple(sorted(factors, key=lambda f: f.id))
    if all(f.lo >= 0 for f in factors):
        lo, hi = math.prod(f.lo for f in factors), 1.0
        for f in factors:
            hi = 0 if f.hi == 0 or hi == 0 else hi * f.hi
    else:
        lo, hi = -INF, INF
    return _make("prod", (factors,), INT, lo, hi)


def _split_multiples(x: Expr, c: int) -> tuple[Expr, Expr]:
    """``x == c*q + r`` with every multiple of `c` moved into q."""
    q, r = divmod(x.args[0], c)
    whole = tuple((a, k // c) for a, k in x.args[1] if k % c == 0)
    rest = tuple((a, k) for a, k in x.args[1] if k % c)
    return _sum(q, whole), _sum(r, rest)


def _split_symbolic(x: Expr, c: Expr) -> tuple[Expr, Expr] | None:
    """The same for a divisor that is one monomial ``k * m`` of size symbols."""
    if c.args[0] or len(c.args[1]) != 1:
        return None
    m, k = c.args[1][0]
    need = list(_factors(m))
    whole: list[tuple[Expr, int]] = []
    rest: list[tuple[Expr, int]] = []
    shift = 0
    for a, j in x.args[1]:
        have = list(_factors(a))
        if j % k == 0 and all(have.count(f) >= need.count(f) for f in need):
            for f in need:
                have.remove(f)
            if have:
                whole.append((_monomial(tuple(have)), j // k))
            else:
                shift += j // k
        else:
            rest.append((a, j))
    return _sum(shift, whole), _sum(x.args[0], rest)


def upper(x: Expr) -> Expr | None:
    """A symbolic upper bound of `x`: every variable with a positive coefficient at its last value."""
    out = integer(x.args[0])
    for a, k in x.args[1]:
        if k < 0:
            if a.lo == -INF:
                return None
            out = plus(out, int(a.lo) * k)
        elif a.op == "var":
            out = plus(out, times(minus(a.args[1], 1), k))
        elif a.op == "size":
            out = plus(out, times(_poly(a), k))
        elif a.hi < INF:
            out = plus(out, int(a.hi) * k)
        else:
            return None
    return out


def within(x: Expr, c: Expr) -> bool:
    """Whether ``0 <= x < c`` follows from the bounds alone."""
    if x.lo < 0:
        return False
    if x.hi < c.lo:
        return True
    top = upper(x)
    return top is not None and minus(minus(c, 1), top).lo >= 0


def _mixed_radix(x: Expr, c: int) -> Iterator[tuple[int, Expr, Expr]]:
    """Splits ``x == g*X + R`` with g dividing c and R within [0, g)."""
    for g in sorted({math.gcd(k, c) for _, k in x.args[1]} - {1}, reverse=True):
        low = _sum(x.args[0] % g, tuple((a, k) for a, k in x.args[1] if k % g))
        if low.lo >= 0 and low.hi < g:
            high = _sum(x.args[0] // g, tuple((a, k // g) for a, k in x.args[1] if k % g == 0))
            yield g, high, low


def _constant_quotient(r: Expr, c: int) -> int | None:
    if r.lo > -INF and r.hi < INF and r.lo // c == r.hi // c:
        return int(r.lo // c)
    return None


def floordiv(x: Expr, c: Expr | int) -> Expr:
    """``x // c`` for a positive divisor, rounding to minus infinity as Python does."""
    d = c if isinstance(c, int) else constant(c)
    if d is None:
        assert isinstance(c, Expr)
        parts = _split_symbolic(x, c)
        if parts is not None:
            whole, rest = parts
            return whole if within(rest, c) else plus(whole, _poly(_make("div", (rest, c), INT, *_div_bounds(rest, c))))
        return ZERO if within(x, c) else _poly(_make("div", (x, c), INT, *_div_bounds(x, c)))
    if d <= 0:
        raise ValueError(f"floordiv: the divisor must be positive, got {d}")
    if d == 1:
        return x
    whole, rest = _split_multiples(x, d)
    q = _constant_quotient(rest, d)
    if q is not None:
        return plus(whole, q)
    for g, high, _ in _mixed_radix(rest, d):
        return plus(whole, floordiv(high, d // g))
    inner = as_atom(rest)
    if inner is not None and inner.op == "div":
        by = constant(inner.args[1])
        if by is not None:
            return plus(whole, floordiv(inner.args[0], by * d))
    return plus(whole, _poly(_make("div", (rest, integer(d)), INT, *_div_bounds(rest, integer(d)))))


def _div_bounds(x: Expr, c: Expr) -> tuple[float, float]:
    lo = -INF if x.lo == -INF else (x.lo // c.lo if x.lo < 0 else (0 if c.hi == INF else x.lo // c.hi))
    hi = INF if x.hi == INF else (x.hi // c.lo if x.hi >= 0 else -1)
    return lo, hi


def mod(x: Expr, c: Expr | int) -> Expr:
    """``x % c`` for a positive divisor, in ``[0, c)``."""
    d = c if isinstance(c, int) else constant(c)
    if d is None:
        assert isinstance(c, Expr)
        parts = _split_symbolic(x, c)
        rest = x if parts is None else parts[1]
        return rest if within(rest, c) else _poly(_make("mod", (rest, c), INT, 0, c.hi - 1))
    if d == 1:
        return ZERO
    _, rest = _split_multiples(x, d)
    q = _constant_quotient(rest, d)
    if q is not None:
        return minus(rest, d * q)
    for g, high, low in _mixed_radix(rest, d):
        return plus(times(mod(high, d // g), g), low)
    inner = as_atom(rest)
    if inner is not None and inner.op == "mod":
        by = constant(inner.args[1])
        if by is not None and by % d == 0:
            return mod(inner.args[0], d)
    return _poly(_make("mod", (rest, integer(d)), INT, 0, d - 1))


def clamp(x: Expr, lo: int | None, hi: int | None) -> Expr:
    """``min(max(x, lo), hi)``, with the bounds known to the result."""
    if lo is not None and x.lo < lo:
        x = _poly(_make("if_int", (at_least(x, integer(lo)), x, integer(lo)), INT, lo, max(x.hi, lo)))
    if hi is not None and x.hi > hi:
        x = _poly(_make("if_int", (at_least(integer(hi), x), x, integer(hi)), INT, min(x.lo, hi), hi))
    return x


# ---------------------------------------------------------------------------------------------- formulas

TRUE = _make("true", (), BOOL)
FALSE = _make("false", (), BOOL)


def boolean(b: bool) -> Expr:
    return TRUE if b else FALSE


def negate(a: Expr) -> Expr:
    if a is TRUE:
        return FALSE
    if a is FALSE:
        return TRUE
    if a.op == "not":
        return a.args[0]
    if a.op == "ge":
        return _nonnegative(minus(integer(-1), a.args[0]))
    return _make("not", (a,), BOOL)


def _flat(op: str, xs: Iterable[Expr], absorb: Expr, drop: Expr) -> list[Expr] | None:
    out: dict[Expr, None] = {}
    for x in xs:
        for y in x.args if x.op == op else (x,):
            if y is absorb or negate(y) in out:
                return None
            if y is not drop:
                out[y] = None
    return sorted(out, key=lambda e: e.id)


def conj(*xs: Expr) -> Expr:
    """Conjunction."""
    parts = _flat("and", xs, FALSE, TRUE)
    if parts is None:
        return FALSE
    return TRUE if not parts else parts[0] if len(parts) == 1 else _make("and", tuple(parts), BOOL)


def disj(*xs: Expr) -> Expr:
    """Disjunction."""
    parts = _flat("or", xs, TRUE, FALSE)
    if parts is None:
        return TRUE
    return FALSE if not parts else parts[0] if len(parts) == 1 else _make("or", tuple(parts), BOOL)


def implies(a: Expr, b: Expr) -> Expr:
    return disj(negate(a), b)


def iff(a: Expr, b: Expr) -> Expr:
    return conj(implies(a, b), implies(b, a))


def _by_condition(x: Expr, f: Callable[[Expr], Expr]) -> Expr | None:
    """A comparison `f` of a polynomial with one conditional atom, taken into its branches if one of them settles it."""
    conditional = [(a, k) for a, k in x.args[1] if a.op == "if_int"]
    if len(conditional) != 1:
        return None
    ((atom, k),) = conditional
    rest = minus(x, times(_poly(atom), k))
    yes, no = (f(plus(rest, times(branch, k))) for branch in atom.args[1:])
    return select(atom.args[0], yes, no) if {yes, no} & {TRUE, FALSE} else None


def _nonnegative(x: Expr) -> Expr:
    if x.lo >= 0:
        return TRUE
    if x.hi < 0:
        return FALSE
    if x.hi == INF or x.lo == -INF:  # symbolic sizes may still cancel: s - 1 - j with j < s
        top, bottom = upper(x), upper(times(x, -1))
        if bottom is not None and bottom.hi <= 0:
            return TRUE
        if top is not None and top.hi < 0:
            return FALSE
    inside = _by_condition(x, _nonnegative)
    if inside is not None:
        return inside
    g = math.gcd(*(k for _, k in x.args[1]))
    if g > 1:
        x = _sum(x.args[0] // g, tuple((a, k // g) for a, k in x.args[1]))
    return _make("ge", (x,), BOOL)


def _is_zero(x: Expr) -> Expr:
    if x.lo > 0 or x.hi < 0:
        return FALSE
    if x.lo == 0 == x.hi:
        return TRUE
    inside = _by_condition(x, _is_zero)
    if inside is not None:
        return inside
    g = math.gcd(*(k for _, k in x.args[1]))
    if x.args[0] % g:
        return FALSE
    if x.args[1][0][1] < 0:
        x = times(x, -1)
    return _make("eq", (x,), BOOL)


def at_least(a: Expr, b: Expr) -> Expr:
    """``a >= b``."""
    return _nonnegative(minus(a, b))


def less(a: Expr, b: Expr) -> Expr:
    """``a < b``."""
    return negate(at_least(a, b))


def equal(a: Expr, b: Expr) -> Expr:
    """``a == b``."""
    return _is_zero(minus(a, b))


def in_range(x: Expr, size: Expr) -> Expr:
    """``0 <= x < size``."""
    return conj(at_least(x, ZERO), less(x, size))


def predicate(name: str, args: Iterable[Expr]) -> Expr:
    """An opaque truth: element `args` of the boolean tensor `name`."""
    return _make("predicate", (name, tuple(args)), BOOL)


def exists(v: Expr, body: Expr) -> Expr:
    """``exists v: body``; conjuncts free of `v` move out, disjunctions split."""
    if body.op == "or":
        return disj(*(exists(v, x) for x in body.args))
    bound = as_var(v)
    assert bound is not None, v
    if body.op == "and":
        outer = [x for x in body.args if bound not in x.free]
        if outer:
            return conj(*outer, exists(v, conj(*(x for x in body.args if bound in x.free))))
    if bound not in body.free:
        # An empty range would make this false; sizes here are those of real dimensions, at least one.
        return body
    return _make("exists", (bound, body), BOOL)


def select(c: Expr, a: Expr, b: Expr) -> Expr:
    """``a if c else b``, of any sort."""
    if c is TRUE:
        return a
    if c is FALSE:
        return b
    if a is b:
        return a
    if a.sort == BOOL:
        return disj(conj(c, a), conj(negate(c), b))
    if a.sort == INT:
        return _poly(_make("if_int", (c, a, b), INT, min(a.lo, b.lo), max(a.hi, b.hi)))
    if b.op == "if_real" and b.args[0] is c:
        b = b.args[2]
    if a.op == "if_real" and a.args[0] is c:
        a = a.args[1]
    return _make("if_real", (c, a, b), REAL)


# ---------------------------------------------------------------------------------------------- reals


def real(c: float) -> Expr:
    """The constant `c`."""
    return _make("const", (float(c),), REAL)


def constant_real(e: Expr) -> float | None:
    """The value of a constant real or integer, or None."""
    return e.args[0] if e.op == "const" else constant(e) if e.sort == INT else None


def load(name: str, coords: Iterable[Expr]) -> Expr:
    """Element `coords` of the real tensor `name`."""
    return _make("load", (name, tuple(coords)), REAL)


def from_int(e: Expr) -> Expr:
    """An integer as a real."""
    c = constant(e)
    if c is not None:
        return real(c)
    a = as_atom(e)
    if a is not None and a.op == "if_int":
        return select(a.args[0], from_int(a.args[1]), from_int(a.args[2]))
    return _make("float", (e,), REAL)


def softmax(name: str, coords: Iterable[Expr]) -> Expr:
    """Element `coords` of the probabilities computed by node `name`."""
    return _make("softmax", (name, tuple(coords)), REAL)


def dot(variables: Iterable[Expr], factors: Iterable[Expr]) -> Expr:
    """``sum over variables of the product of the factors``."""
    return _make("dot", (tuple(variables), tuple(factors)), REAL)


def opaque(name: str, *factors: Expr) -> Expr:
    """A real function of reals without further meaning."""
    return _make("opaque", (name, tuple(factors)), REAL)


def scaled(e: Expr, k: float) -> Expr:
    """``k * e``, pushed to the leaves of the case tree."""

    def leaf(x: Expr) -> Expr:
        if k == 1:
            return x
        if x.op == "const":
            return real(x.args[0] * k)
        if x.op == "float" and k == int(k):
            return _make("float", (times(x.args[0], int(k)),), REAL)
        if x.op == "scaled":
            return _make("scaled", (x.args[0] * k, x.args[1]), REAL)
        return _make("scaled", (float(k), x), REAL)

    return map_cases(e, leaf)


def add_reals(a: Expr, b: Expr) -> Expr:
    """``a + b``, pushed to the leaves of both case trees."""

    def leaf(x: Expr, y: Expr) -> Expr:
        if x.op == y.op == "const":
            return real(x.args[0] + y.args[0])
        if x.op == y.op == "float":
            return _make("float", (plus(x.args[0], y.args[0]),), REAL)
        if y.op == "const":
            x, y = y, x
        if x.op == "const":
            c = x.args[0]
            if c == 0:
                return y
            if y.op == "float" and c == int(c):
                return _make("float", (plus(y.args[0], int(c)),), REAL)
        return _make("add", (x, y), REAL)

    return map_cases(a, lambda x: map_cases(b, lambda y: leaf(x, y)))


def add_to_infinity(e: Expr) -> Expr:
    """``e + -inf``, kept as a sum: the value is -inf, but a gradient flows to `e`."""
    return map_cases(e, lambda t: t if t.op == "const" and t.args[0] == -INF else _make("add", (real(-INF), t), REAL))


def compare_reals(op: str, a: Expr, b: Expr) -> Expr:
    """``a op b`` with op one of "eq", "gt", "ge", pushed to the leaves of both case trees."""

    def leaf(x: Expr, y: Expr) -> Expr:
        x, y = _value(x), _value(y)
        if x.op == y.op == "const":
            u, v = x.args[0], y.args[0]
            return boolean({"eq": u == v, "gt": u > v, "ge": u >= v}[op])
        p, q = _exact_int(x), _exact_int(y)
        if p is not None and q is not None:
            return compare_ints(op, p, q)
        return _make("compare", (op, x, y), BOOL)

    return map_truth(a, lambda x: map_truth(b, lambda y: leaf(x, y)))


def _value(e: Expr) -> Expr:
    """An infinity plus a datum is that infinity, where only the value counts."""
    infinite = [t for t in (e.args if e.op == "add" else ()) if t.op == "const" and math.isinf(t.args[0])]
    return infinite[0] if len(infinite) == 1 else e


def compare_ints(op: str, a: Expr, b: Expr) -> Expr:
    return {"eq": equal, "ge": at_least, "gt": lambda p, q: less(q, p)}[op](a, b)


def _exact_int(x: Expr) -> Expr | None:
    if x.op == "float":
        return x.args[0]
    if x.op == "const" and math.isfinite(x.args[0]) and x.args[0] == int(x.args[0]):
        return integer(int(x.args[0]))
    return None


def map_cases(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Apply `f` to every leaf of a case tree."""
    if e.op == "if_real":
        return select(e.args[0], map_cases(e.args[1], f), map_cases(e.args[2], f))
    return f(e)


def map_truth(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Apply the truth-valued `f` to every leaf of a case tree."""
    if e.op == "if_real":
        c = e.args[0]
        return disj(conj(c, map_truth(e.args[1], f)), conj(negate(c), map_truth(e.args[2], f)))
    return f(e)


def cases(e: Expr, given: Expr = TRUE) -> Iterator[tuple[Expr, Expr]]:
    """The leaves of a case tree, each with the condition under which it holds."""
    if e.op == "if_real":
        yield from cases(e.args[1], conj(given, e.args[0]))
        yield from cases(e.args[2], conj(given, negate(e.args[0])))
    elif given is not FALSE:
        yield given, e


def truth(e: Expr) -> Expr:
    """Python's ``bool`` of an expression of any sort."""
    if e.sort == BOOL:
        return e
    if e.sort == INT:
        a = as_atom(e)
        if a is not None and a.op == "if_int":
            return select(a.args[0], truth(a.args[1]), truth(a.args[2]))
        return negate(_is_zero(e))
    return negate(compare_reals("eq", e, real(0)))


# ---------------------------------------------------------------------------------------------- substitution


def substitute(e: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace free variables (atoms) by integer expressions and normalise again."""
    memo: dict[Expr, Expr] = {}

    def go(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(go(y) for y in x)
        if not isinstance(x, Expr) or not (x.free & mapping.keys()):
            return x
        r = memo.get(x)
        if r is None:
            r = memo[x] = mapping[x] if x.op == "var" else rebuild(x, go)
        return r

    return go(e)


def replace_formula(e: Expr, old: Expr, new: Expr) -> Expr:
    """Replace a sub-formula under connectives."""
    if e is old:
        return new
    if e.op in ("and", "or", "not"):
        return rebuild(e, lambda x: replace_formula(x, old, new) if isinstance(x, Expr) else x)
    return e


def rebuild(e: Expr, f: Callable[[Any], Any]) -> Expr:
    """`e` with `f` applied to its operands; atoms of sums may become polynomials."""
    op, a = e.op, e.args
    if op == "sum":
        out = integer(a[0])
        for t, k in a[1]:
            r = f(t)
            out = plus(out, times(r if r.op == "sum" else _poly(r), k))
        return out
    if op == "prod":
        out = ONE
        for t in a[0]:
            r = f(t)
            out = times(out, r if r.op == "sum" else _poly(r))
        return out
    if op == "exists":
        return exists(_poly(a[0]), f(a[1]))
    new = tuple(f(x) for x in a)
    if op == "div":
        return floordiv(*new)
    if op == "mod":
        return mod(*new)
    if op == "apply":
        return _poly(_make(op, new, INT, e.lo, e.hi))
    if op == "if_int":
        r = select(*new)
        atom = as_atom(r)
        if atom is not None and atom.op == "if_int":  # a clamp knows tighter bounds than its branches
            return _poly(_make("if_int", atom.args, INT, max(atom.lo, e.lo), min(atom.hi, e.hi)))
        return r
    if op == "if_real":
        return select(*new)
    if op == "not":
        return negate(*new)
    if op == "and":
        return conj(*new)
    if op == "or":
        return disj(*new)
    if op == "ge":
        return _nonnegative(*new)
    if op == "eq":
        return _is_zero(*new)
    if op == "compare":
        return compare_reals(*new)
    return _make(op, new, e.sort, e.lo, e.hi)


# ---------------------------------------------------------------------------------------------- printing


def show(e: Expr) -> str:
    """`e` as a person would write it."""
    op, a = e.op, e.args
    if op == "sum":
        parts = [f"{'' if k == 1 else '-' if k == -1 else f'{k}*'}{show(t)}" for t, k in a[1]]
        if a[0] or not parts:
            parts.append(str(a[0]))
        text = " + ".join(parts).replace("+ -", "- ")
        return text if len(parts) == 1 else f"({text})"
    if op in ("var", "size"):
        return a[0]
    if op == "prod":
        return "*".join(map(show, a[0]))
    if op == "div":
        return f"{show(a[0])}//{show(a[1])}"
    if op == "mod":
        return f"{show(a[0])}%{show(a[1])}"
    if op in ("apply", "predicate", "load", "softmax"):
        return f"{a[0]}[{', '.join(map(show, a[1]))}]"
    if op == "ge":
        return f"{show(a[0])} >= 0"
    if op == "eq":
        return f"{show(a[0])} == 0"
    if op == "not":
        return f"not ({show(a[0])})"
    if op in ("and", "or"):
        return "(" + f" {op} ".join(map(show, a)) + ")"
    if op in ("if_int", "if_real"):
        return f"({show(a[1])} if {show(a[0])} else {show(a[2])})"
    if op == "const":
        return str(a[0])
    if op == "compare":
        return f"{show(a[1])} {dict(eq='==', gt='>', ge='>=')[a[0]]} {show(a[2])}"

    def inner(x: Any) -> str:
        if isinstance(x, Expr):
            return show(x)
        return "(" + ", ".join(map(inner, x)) + ")" if isinstance(x, tuple) else str(x)

    return f"{op}({', '.join(map(inner, a))})"
