"""Integers: polynomials over atoms, in a normal form in which a reshape and its inverse cancel.

``k*m*(x // m) + k*(x % m)`` is ``k*x``; quotients and remainders drop multiples and split mixed radices; a quotient of a
quotient is one; an expression within one period is its own remainder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .node import INF, INT, Expr, make


def weighted_sum(constant: int, terms: Iterable[tuple[Expr, int]]) -> Expr:
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
    return make("sum", (constant, ordered), INT, lo, hi)


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
    return weighted_sum(int(c), ())


ZERO, ONE = integer(0), integer(1)


def var(name: str, size: Expr | int) -> Expr:
    """A coordinate: ``0 <= name < size``."""
    size = integer(size) if isinstance(size, int) else size
    return poly(make("var", (name, size), INT, 0, max(size.hi - 1, 0)))


def size_symbol(name: str, lo: float, hi: float) -> Expr:
    """A symbolic size with ``lo <= name <= hi``; free of coordinates, the same at run time for the whole graph."""
    return poly(make("size", (name,), INT, max(lo, 0), hi))


def apply(name: str, args: Iterable[Expr], lo: float = -INF, hi: float = INF) -> Expr:
    """An uninterpreted integer: element `args` of the data-dependent tensor `name`, within ``[lo, hi]``."""
    return poly(make("apply", (name, tuple(args)), INT, lo, hi))


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
    return weighted_sum(0, ((atom, 1),))


def constant(e: Expr) -> int | None:
    """The value of a constant integer, or None."""
    return e.args[0] if e.op == "sum" and not e.args[1] else None


def branches(e: Expr) -> tuple[Expr, ...]:
    """The values that a conditional integer takes, also nested; a clamp is one."""
    a = as_atom(e)
    if a is None or a.op != "if_int":
        return ()
    return tuple(leaf for branch in a.args[1:] for leaf in (branch, *branches(branch)))


def plus(a: Expr, b: Expr | int) -> Expr:
    if isinstance(b, int):
        return weighted_sum(a.args[0] + b, a.args[1])
    return weighted_sum(a.args[0] + b.args[0], a.args[1] + b.args[1])


def minus(a: Expr, b: Expr | int) -> Expr:
    return plus(a, -b) if isinstance(b, int) else plus(a, times(b, -1))


def times(a: Expr, b: Expr | int) -> Expr:
    """The product; products of atoms are kept as sorted monomials."""
    if isinstance(b, int):
        return weighted_sum(a.args[0] * b, tuple((x, k * b) for x, k in a.args[1]))
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
            terms.append((monomial(_factors(x) + _factors(y)), j * k))
    return weighted_sum(a.args[0] * b.args[0], terms)


def _factors(atom: Expr) -> tuple[Expr, ...]:
    return atom.args[0] if atom.op == "prod" else (atom,)


def monomial(factors: tuple[Expr, ...]) -> Expr:
    if len(factors) == 1:
        return factors[0]
    factors = tuple(sorted(factors, key=lambda f: f.id))
    if all(f.lo >= 0 for f in factors):
        lo, hi = math.prod(f.lo for f in factors), 1.0
        for f in factors:
            hi = 0 if f.hi == 0 or hi == 0 else hi * f.hi
    else:
        lo, hi = -INF, INF
    return make("prod", (factors,), INT, lo, hi)


def _split_multiples(x: Expr, c: int) -> tuple[Expr, Expr]:
    """``x == c*q + r`` with every multiple of `c` moved into q."""
    q, r = divmod(x.args[0], c)
    whole = tuple((a, k // c) for a, k in x.args[1] if k % c == 0)
    rest = tuple((a, k) for a, k in x.args[1] if k % c)
    return weighted_sum(q, whole), weighted_sum(r, rest)


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
                whole.append((monomial(tuple(have)), j // k))
            else:
                shift += j // k
        else:
            rest.append((a, j))
    return weighted_sum(shift, whole), weighted_sum(x.args[0], rest)


def upper(x: Expr) -> Expr | None:
    """A symbolic upper bound of `x`: every variable with a positive coefficient at its last value."""
    out = integer(x.args[0])
    for a, k in x.args[1]:
        if a.op == "size":
            out = plus(out, times(poly(a), k))
        elif k < 0:
            if a.lo == -INF:
                return None
            out = plus(out, int(a.lo) * k)
        elif a.op == "var":
            out = plus(out, times(minus(a.args[1], 1), k))
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
        low = weighted_sum(x.args[0] % g, tuple((a, k) for a, k in x.args[1] if k % g))
        if low.lo >= 0 and low.hi < g:
            high = weighted_sum(x.args[0] // g, tuple((a, k // g) for a, k in x.args[1] if k % g == 0))
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
            return whole if within(rest, c) else plus(whole, poly(make("div", (rest, c), INT, *_div_bounds(rest, c))))
        return ZERO if within(x, c) else poly(make("div", (x, c), INT, *_div_bounds(x, c)))
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
    return plus(whole, poly(make("div", (rest, integer(d)), INT, *_div_bounds(rest, integer(d)))))


def _div_bounds(x: Expr, c: Expr) -> tuple[float, float]:
    least = max(c.lo, 1)  # a size may be zero, but then nothing is divided by it
    lo = -INF if x.lo == -INF else (x.lo // least if x.lo < 0 else (0 if c.hi == INF else x.lo // max(c.hi, 1)))
    hi = INF if x.hi == INF else (x.hi // least if x.hi >= 0 else -1)
    return lo, hi


def mod(x: Expr, c: Expr | int) -> Expr:
    """``x % c`` for a positive divisor, in ``[0, c)``."""
    d = c if isinstance(c, int) else constant(c)
    if d is None:
        assert isinstance(c, Expr)
        parts = _split_symbolic(x, c)
        rest = x if parts is None else parts[1]
        return rest if within(rest, c) else poly(make("mod", (rest, c), INT, 0, c.hi - 1))
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
    return poly(make("mod", (rest, integer(d)), INT, 0, d - 1))
