"""Scores that are sums of probabilities, taken apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import expr as x
from ..expr import Expr
from ..reader import Coords


@dataclass(frozen=True)
class Share:
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

    def where(self, given: Expr) -> Share:
        """The same, where a further condition holds."""
        return replace(self, given=x.conj(given, self.given))


def sum_of_probabilities(e: Expr) -> tuple[float, list[Share] | None]:
    """A leaf of the scores as a constant and shares of probabilities; None for the shares if it is something else."""
    if e.op == "const":
        return e.args[0], []
    if e.op == "add":
        parts = [sum_of_probabilities(t) for t in e.args]
        if any(shares is None for _, shares in parts):
            return 0.0, None
        return sum(c for c, _ in parts), [s for _, shares in parts for s in shares or ()]
    shares = shares_of(e)
    return 0.0, shares


def shares_of(e: Expr, so_far: Share = Share("", ())) -> list[Share] | None:
    """An expression that is linear in probabilities, taken apart; None if it is not."""
    if e.op == "const":
        return [] if e.args[0] == 0 else None
    if e.op == "softmax":
        return [replace(so_far, softmax=e.args[0], at=e.args[1])]
    if e.op == "scaled":
        return shares_of(e.args[1], replace(so_far, factor=so_far.factor * e.args[0]))
    if e.op == "opaque" and e.args[0] == "nan_to_0":
        return shares_of(e.args[1][0], replace(so_far, zeroed=True))
    if e.op == "if_real":
        parts = [
            shares_of(t, replace(so_far, given=x.conj(so_far.given, g)))
            for g, t in ((e.args[0], e.args[1]), (x.negate(e.args[0]), e.args[2]))
        ]
    elif e.op == "add":
        parts = [shares_of(t, so_far) for t in e.args]
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
        parts = [shares_of(data[0], w) for w in weights]
    else:
        return None
    return None if any(p is None for p in parts) else [s for p in parts for s in p or ()]


def _weighted(share: Share, factor: Expr) -> Iterator[Share]:
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
