"""Hash-consed nodes: equal in normal form iff the same object."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        from .show import show

        return show(self)


_table: WeakValueDictionary[tuple, Expr] = WeakValueDictionary()
_ids = itertools.count()


def _key(x: Any) -> Any:
    if isinstance(x, Expr):
        return x.id
    if isinstance(x, tuple):
        return tuple(map(_key, x))
    return type(x).__name__, x


BOUNDED = ("apply", "size")
"""What has bounds of its own, beyond those of its operands: equal only if the bounds are equal."""


class TimeSpent(Exception):
    """The time for making expressions is over."""


class _Clock(threading.local):
    """Seconds of this thread's own time, so that a loaded machine changes nothing."""

    until = INF
    ticks = 0


_clock = _Clock()
_TICKS = 256
"""Expressions between two looks at the clock: about a millisecond."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Bounds what is done with expressions in the block: nested choices multiply, and some cannot be told from outside.

    Args:
        seconds: CPU time of this thread. A limit around this one holds too.

    Raises:
        TimeSpent: From within the block, where an expression is made after that time.
    """
    before = _clock.until
    _clock.until = min(before, time.thread_time() + seconds)
    try:
        yield
    finally:
        _clock.until = before


def make(op: str, args: tuple, sort: str, lo: float = -INF, hi: float = INF) -> Expr:
    _clock.ticks += 1
    if _clock.ticks % _TICKS == 0 and time.thread_time() > _clock.until:
        raise TimeSpent
    key = (op, sort, _key(args), (lo, hi) if op in BOUNDED else ())
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
