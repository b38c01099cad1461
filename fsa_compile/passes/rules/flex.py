"""Values: `flex_attention`, whose score and mask functions are read like any other graph."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.fx import GraphModule, Node

from ...report import ReasonKind
from .. import expr as x
from ..expr import Expr
from ..nodes import is_real, is_tensor, rank
from ..reader import Coords, Mode, Reader, Unreadable, fused, values
from ..refusal import Refusal
from .contraction import operand

FLEX = "fsa_shadow::flex_attention"


class BodyReader(Reader):
    """Reads the graph of a function of scalars, for one value of each.

    Args:
        outer: The reader of the graph that the call stands in.
        graph_module: The function.
        given: For each placeholder: an expression, or the node of `outer` that is captured.
    """

    def __init__(self, outer: Reader, graph_module: GraphModule, given: Mapping[Node, Expr | Node]) -> None:
        super().__init__(graph_module)
        self.outer, self.given = outer, given
        self.sizes, self.operands, self.unread = outer.sizes, outer.operands, outer.unread
        self._scalars = tuple(e for e in given.values() if isinstance(e, Expr) and e.sort == x.INT)

    def _read(self, n: Node, coords: Coords, mode: Mode) -> Expr:
        if n not in self.given:
            return super()._read(n, coords, mode)
        value = self.given[n]
        return value if isinstance(value, Expr) else self.outer.read(value, coords, mode)

    def leaf(self, n: Node, coords: Coords) -> Expr:
        """An element that no rule describes: it may depend on all scalars."""
        return super().leaf(n, coords + self._scalars)

    def result(self) -> Expr:
        """The scalar that the function returns.

        Raises:
            Unreadable: If it returns something else.
        """
        (out,) = next(n for n in self.graph_module.graph.nodes if n.op == "output").args
        if isinstance(out, (tuple, list)) and len(out) == 1:
            (out,) = out
        if not is_tensor(out) or rank(out):
            raise Unreadable("a function of flex_attention that returns no scalar")
        return self.read(out, ())


@values(FLEX)
def _flex(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    k, v = n.args[1:3]
    b, h, i, d = c
    j = x.var(f"{n.name}.j", r.shape(k)[-2])
    return r.contraction([j], [(None, (), x.softmax(n.name, (b, h, i, j))), operand(r, v, _of_keys(r, n, v, (b, h, j, d)))])


@fused(FLEX)
def _flex_logit(r: Reader, n: Node, c: Coords) -> Expr:
    """The logit at (batch, head, query, key): what the score function makes of scale * <q, k>, -inf where the mask hides it."""
    q, k, _, captured, _ = n.args
    bodies = n.meta["flex"]
    b, h, i, j = c
    d = x.var(f"{n.name}.d", r.shape(q)[-1])
    product = r.contraction([d], [operand(r, q, (b, h, i, d)), operand(r, k, _of_keys(r, n, k, (b, h, j, d)))])
    scale = bodies.call.scale
    if scale is None:
        raise Refusal(ReasonKind.LOGITS, "the scale of flex_attention is dynamic: give it as a number")
    try:
        e = _body(r, bodies.score, (x.scaled(product, scale), *c), captured, bodies.score_captured)
        seen = x.truth(_body(r, bodies.mask, c, captured, bodies.mask_captured))
    except Unreadable as fault:
        raise Refusal(ReasonKind.LOGITS, str(fault)) from None
    return x.select(seen, e, x.real(-math.inf))


def _of_keys(r: Reader, n: Node, t: Node, c: Coords) -> Coords:
    """Where keys or values of a query head stand: grouped heads, and perhaps one batch row for all."""
    heads, kv_heads = (x.constant(r.shape(a)[1]) for a in (n.args[0], t))
    if heads is None or kv_heads is None:
        raise Refusal(ReasonKind.HEAD_MAP, "the number of heads is dynamic")
    return r.align(t, (c[0], x.floordiv(c[1], heads // kv_heads), *c[2:]))


def _body(r: Reader, body: GraphModule, scalars: Coords, captured: list[Node], places: tuple[int | None, ...]) -> Expr:
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    given: dict[Node, Expr | Node] = dict(zip(inputs, scalars))
    for n, place in zip(inputs[len(scalars) :], places):
        if place is not None:
            given[n] = captured[place]
    reader = BodyReader(r, body, given)
    out = reader.result()
    return reader.coerce(inputs[0], out) if is_real(inputs[0]) and out.sort != x.REAL else out
