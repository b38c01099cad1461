"""What a site that is refused looks like: full causal attention is called that in the report, whatever was wrong with it."""

from __future__ import annotations

from torch.fx import Node

from . import expr as x
from .expr import Expr
from .nodes import op_name, rank
from .reader import FUSED, Reader, Unreadable
from .refusal import Refusal
from .smt import solve
from .temperature import terms

LOW = -1e3
"""A constant at or below this is meant to mask, whether it does or not."""


def appearance(r: Reader, softmax: Node) -> str | None:
    """ "causal" if the mask of a softmax is the triangle of all keys up to the query's own; nothing is proven of the rest.

    Args:
        r: Reader of the shadow graph.
        softmax: The node that normalises.
    """
    try:
        source, d = r.softmax_axis(softmax)
        shape = (*r.shape(source)[:-1], r.shape(softmax.args[1])[-2]) if op_name(softmax) in FUSED else r.shape(source)
        coords = tuple(x.var(f"{softmax.name}.seen{k}", size) for k, size in enumerate(shape))
        visible = _visible(r, r.logit(softmax, coords), coords[d])
    except (Unreadable, Refusal, x.TimeSpent, RecursionError):
        return None
    rows = [k for k in range(rank(source)) if k != d and x.as_var(coords[k]) in visible.free]
    if len(rows) != 1:
        return None
    query, key = coords[rows[0]], coords[d]
    for first in (x.ZERO, x.minus(shape[d], shape[rows[0]])):
        triangle = x.at_least(x.plus(query, first), key)
        if visible is triangle or solve([], x.iff(visible, triangle), 200) is None:
            return "causal"
    return None


def _visible(r: Reader, logit: Expr, key: Expr) -> Expr:
    """Which keys have a logit that is not masked."""
    jv = x.as_var(key)
    shown = []
    for condition, leaf in x.cases(logit):
        numbers = [t.number * t.rest.args[0] for t in terms(r, leaf, jv) if t.rest.op == "const"]
        if sum(numbers) > LOW:
            shown.append(condition)
    return x.disj(*shown)
