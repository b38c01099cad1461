"""Between which numbers a score lies, as far as its formula shows: a probability is at most one, a sum of four at most four.

This is how a block is known to be picked whose score was raised by a constant: ``scores + own * 1e9``, ``scores.scatter(-1, own,
2.0)``. A probability is in range only where it is a number. A row whose logits are all -inf is NaN, which a top-k ranks highest;
so nothing is said of a probability unless some logit of its row is known not to be -inf.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.fx import Node

from . import expr as x
from .expr import Expr
from .nodes import argument, axis, is_real, is_tensor, op_name, rank
from .reader import Mode, Reader, SOFTMAXES, Unreadable
from .smt import solve

Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)
SLACK = 2.0**-7
"""Relative rounding that is granted to arithmetic. Rounding is monotone, so that even bfloat16 stays within the rounded ends."""
MOST_CASES = 16
"""Case trees that together have more leaves are not taken apart."""


class Ranges:
    """Ranges of the leaves of what a top-k ranks.

    Args:
        r: The reader.
        keys: Places on the axis of a softmax at which a logit may be known not to be -inf.
    """

    def __init__(self, r: Reader, keys: Sequence[Expr]) -> None:
        self.r, self.keys = r, keys

    def facts(self, e: Expr) -> Iterator[Expr]:
        """What is known of the sizes of the real leaves of `e`, each under its own condition."""
        for where, t in x.cases(e):
            for given, (lo, hi) in self._pieces(t, where) if t.op in ("load", "softmax", "opaque", "dot") else ():
                if lo > -math.inf:
                    yield x.implies(given, x.compare_reals("ge", t, x.real(lo)))
                if hi < math.inf:
                    yield x.implies(given, x.compare_reals("ge", x.real(hi), t))

    def _pieces(self, t: Expr, where: Expr) -> Iterator[tuple[Expr, Range]]:
        """Conditions, and the range under each, of a leaf that matters where `where` holds."""
        arithmetic = self._arithmetic(t)
        if t.op == "softmax":
            yield from ((number, (0.0, 1.0)) for number in self._is_number(t, where))
        elif arithmetic is None:
            yield x.TRUE, self.of_leaf(t, x.TRUE)
        else:
            combine, operands = arithmetic
            for given, leaves in _joint_cases(operands, x.TRUE):
                yield given, combine(*(self.of_leaf(leaf, given) for leaf in leaves))

    def of_tree(self, e: Expr, given: Expr = x.TRUE) -> Range:
        """The range of all leaves of a case tree that `given` leaves possible."""
        return _hull(self.of_leaf(*leaves, g) for g, leaves in _joint_cases([e], given)) if e.sort == x.REAL else EVERYTHING

    def of_leaf(self, t: Expr, given: Expr) -> Range:
        """The range of a leaf where `given` holds."""
        if t.op == "const":
            return EVERYTHING if math.isnan(t.args[0]) else (t.args[0], t.args[0])
        if t.op == "float":
            return t.args[0].lo, t.args[0].hi
        if t.op == "softmax":
            return (0.0, 1.0) if any(_follows(number, given) for number in self._is_number(t, given)) else EVERYTHING
        if t.op == "opaque" and t.args[0] == "nan_to_0" and t.args[1][0].op == "softmax":
            return 0.0, 1.0
        if t.op == "scaled":
            return _times((t.args[0], t.args[0]), self.of_leaf(t.args[1], given))
        if t.op == "add":
            return _plus(*(self.of_leaf(a, given) for a in t.args))
        if t.op == "dot":
            return _summed(self._product(t), [v.args[1] for v in t.args[0]])
        if t.op != "load":
            return EVERYTHING
        arithmetic = self._arithmetic(t)
        if arithmetic is None:
            return self._by_op(self.r.nodes[t.args[0]])
        combine, operands = arithmetic
        return _hull(combine(*(self.of_leaf(leaf, g) for leaf in leaves)) for g, leaves in _joint_cases(operands, given))

    def _is_number(self, t: Expr, where: Expr) -> Iterator[Expr]:
        """Conditions of which each makes a probability certainly no NaN: a certain logit of its row is not -inf; or some one is,
        if `where` asks for that, as in ``p.masked_fill(~mask.any(-1, keepdim=True), 0)``."""
        node = self.r.nodes[t.args[0]]
        if op_name(node) not in SOFTMAXES:
            return
        source, d = self.r.softmax_axis(node)
        width = self.r.shape(source)[d]

        def finite(key: Expr) -> Expr:
            logit = self.r.read(source, (*t.args[1][:d], key, *t.args[1][d + 1 :]), Mode.VALUE)
            return x.negate(x.disj(*(g for g, leaf in x.cases(logit) if x.is_infinite(leaf))))

        yield finite(t.args[1][d])
        yield from (x.conj(x.in_range(key, width), finite(key)) for key in self.keys)
        for some in (e for e in x.walk(where) if e.op == "exists" and e.args[0].args[1] is width):
            if _follows(finite(x.poly(some.args[0])), some.args[1]):
                yield some

    def _product(self, contraction: Expr) -> Range:
        """One summand of a contraction."""
        out = (1.0, 1.0)
        for n, c in self.r.operands.get(contraction, ((None, ()),)):
            out = _times(out, self.of_tree(self.r.read(n, c, Mode.VALUE)) if n is not None else EVERYTHING)
        return out

    def _arithmetic(self, t: Expr) -> tuple[Callable[[Range, Range], Range], list[Expr]] | None:
        """If a leaf is the sum, product or extremum of two values: how their ranges combine, and the values."""
        n = self.r.nodes.get(t.args[0]) if t.op == "load" else None
        if n is None or op_name(n) not in _ELEMENTWISE or argument(n, 2, "alpha", 1) != 1:
            return None
        try:
            return _ELEMENTWISE[op_name(n)], [self.r.coerce(n, self.r.operand(n, v, t.args[1], Mode.VALUE)) for v in n.args[:2]]
        except Unreadable:
            return None

    def _by_op(self, n: Node) -> Range:
        """The range of what has no formula, at any coordinates."""
        if op_name(n) == "getitem" and n.args[1] == 0:
            n = n.args[0]
        name, source = op_name(n), n.args[0] if n.args else None
        if name == "sigmoid":
            return 0.0, 1.0
        if not is_tensor(source) or not is_real(source):
            return EVERYTHING
        if name in ("amax", "max", "mean", "max_pool1d", "max_pool1d_with_indices", "detach", "_to_copy"):
            return _rounded(self._anywhere(source))
        if name == "avg_pool1d" or name == "nan_to_num" and argument(n, 1, "nan") in (None, 0, 0.0):
            return _rounded(_hull([self._anywhere(source), (0.0, 0.0)]))
        if name == "sum":
            dims = argument(n, 1, "dim")
            over = [axis(d, rank(source)) for d in ([dims] if isinstance(dims, int) else dims or range(rank(source)))]
            return _summed(self._anywhere(source), [self.r.shape(source)[d] for d in over])
        return EVERYTHING

    def _anywhere(self, n: Node) -> Range:
        """The range of all elements of a node."""
        return self.of_tree(self.r.read(n, [x.var(f"{n.name}.at{d}", size) for d, size in enumerate(self.r.shape(n))], Mode.VALUE))


def _follows(e: Expr, given: Expr) -> bool:
    return e is x.TRUE or e is given or solve([], x.implies(given, e), 200) is None


def _joint_cases(trees: Sequence[Expr], given: Expr) -> list[tuple[Expr, tuple[Expr, ...]]]:
    """The leaves of several case trees together, each with the condition; none if there are too many."""
    leaves = [list(x.cases(e)) for e in trees]
    if math.prod(map(len, leaves)) > MOST_CASES:
        return []
    joint = ((x.conj(given, *(g for g, _ in some)), tuple(t for _, t in some)) for some in itertools.product(*leaves))
    return [(g, some) for g, some in joint if g is not x.FALSE]


def _summed(one: Range, sizes: Iterable[Expr]) -> Range:
    """The sum of so many values."""
    extents = list(sizes)
    least, most = math.prod(s.lo for s in extents), math.prod(s.hi for s in extents)
    lo, hi = one
    return _rounded((lo * (most if lo < 0 else least) if lo else 0.0, hi * (most if hi > 0 else least) if hi else 0.0))


def _plus(a: Range, b: Range) -> Range:
    return _rounded((a[0] + b[0], a[1] + b[1]))


def _times(a: Range, b: Range) -> Range:
    if math.inf in map(abs, (*a, *b)):
        return EVERYTHING  # 0 * inf is NaN
    ends = [p * q for p, q in itertools.product(a, b)]
    return _rounded((min(ends), max(ends)))


_ELEMENTWISE: dict[str, Callable[[Range, Range], Range]] = {
    "add": _plus,
    "sub": lambda a, b: _plus(a, (-b[1], -b[0])),
    "mul": _times,
    "maximum": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "minimum": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
}


def _hull(ranges: Iterable[Range]) -> Range:
    both = list(ranges)
    return (min(lo for lo, _ in both), max(hi for _, hi in both)) if both else EVERYTHING


def _rounded(a: Range) -> Range:
    lo, hi = (EVERYTHING[k] if math.isnan(e) else e for k, e in enumerate(a))
    return lo - abs(lo) * SLACK if math.isfinite(lo) else lo, hi + abs(hi) * SLACK if math.isfinite(hi) else hi
