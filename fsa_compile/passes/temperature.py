"""Temperatures: factors of all logits of a row, such as a learned scale. ``f(b, h, i) * <q, k>`` is ``<f * q, k>``.

A logit is a sum of terms, each a constant times temperatures times one more thing. What is multiplied must be read as one
value at its own place (`Reader.products`), since the rewrite multiplies the query by that very tensor, and the gradient of
the factor then flows through the user's graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from ..report import ReasonKind
from . import expr as x
from .attention_form import Temperature
from .expr import Expr
from .operands import chain
from .reader import Coords, Reader
from .refusal import Refusal


@dataclass(frozen=True)
class Factor:
    """A temperature, before a node of the model's own graph is chosen for it.

    Attributes:
        node, coords: Where it is read.
        inverse: Whether the logits are divided by it.
    """

    node: Node
    coords: Coords
    inverse: bool = False


@dataclass(frozen=True)
class Term:
    """``number * the factors * rest``, a summand of a logit."""

    number: float
    factors: tuple[Factor, ...]
    rest: Expr


def terms(r: Reader, e: Expr, jv: Expr) -> Iterator[Term]:
    """The summands of a leaf of a logit; what does not depend on the key `jv` and multiplies what does is a factor."""
    if e.op == "add":
        yield from terms(r, e.args[0], jv)
        yield from terms(r, e.args[1], jv)
    elif e.op == "scaled":
        yield from (replace(t, number=t.number * e.args[0]) for t in terms(r, e.args[1], jv))
    else:
        factored = _factored(r, e, jv)
        if factored is None:
            yield Term(1.0, (), e)
        else:
            factor, inner = factored
            yield from (replace(t, factors=(factor, *t.factors)) for t in terms(r, inner, jv))


def _factored(r: Reader, e: Expr, jv: Expr) -> tuple[Factor, Expr] | None:
    """A product or quotient as the factor that does not depend on the key, and the rest."""
    for k, place in enumerate(r.products.get(e, ())):
        factor, inner = e.args[1][k], e.args[1][1 - k]
        divides = e.args[0] == "div"
        if place is not None and jv not in factor.free and jv in inner.free and not (divides and k == 0):
            return Factor(*place, inverse=divides), inner
    return None


def choose(r: Reader, factor: Factor, queries: Node, replaceable: frozenset[Node]) -> Temperature:
    """A node of the model's own graph that holds a factor of `queries`.

    Raises:
        Refusal: If there is none.
    """
    name, source = r.place(factor.node.name)
    if factor.node.meta["val"].device != queries.meta["val"].device:  # which a single number may be
        raise Refusal(ReasonKind.DEVICE, f"the logits are multiplied by {name}, which is on another device", source=source)
    for step in chain(r, factor.node, factor.coords):
        computed = any(t.op in ("apply", "exists", "predicate", "compare") for c in step.coords for t in x.walk(c))
        if step.node in replaceable and step.guard is x.TRUE and step.factor == 1 and not computed:
            return Temperature(step.node.name, step.coords, factor.inverse)
    text = f"the logits are multiplied by {name}, which is no value of the model's own graph"
    raise Refusal(ReasonKind.OPERANDS, text, source=source)
