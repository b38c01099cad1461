"""One contraction of probabilities and values, read down to scale * <q, k>, a mask and fills.

Batch and heads have no names yet: that is `cut.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..report import ReasonKind
from . import expr as x
from .expr import Expr
from .nodes import dtype, is_real, is_tensor, op_name, rounded
from .reader import Coords, Reader
from .refusal import Refusal
from .row_sums import EmptyRow, empty_row
from .smt import solve
from .temperature import Factor, Term, terms

SAFE = ("scaled_dot_product_attention", "_safe_softmax", "fsa_shadow::flex_attention")
"""Softmaxes that give zeros, not NaN, for a row of -inf."""


def negligible(dt: torch.dtype) -> float:
    """A finite fill at or below this counts as -inf: -1e9 as the dtype holds it, or a tenth of finfo.min (float16)."""
    return max(rounded(-1e9, dt), torch.finfo(dt).min / 10)


@dataclass(frozen=True)
class NormalForm:
    """Lifted, but not yet cut: what is known before heads and batch have names.

    Attributes:
        coords: The four virtual coordinates of the output; `value_dim` is the one that belongs to the values.
        j: The key index; d: the head dimension that queries and keys contract; width: how many key indices there are.
        visible, fills, additive, in_sums, scale, zero_rows, settled: As in `AttentionForm`.
        factors: What becomes the form's temperatures.
        probability: The element of the softmax's result.
        q, k, v: The operands at the contractions: (node, coordinates).
    """

    coords: tuple[Expr, ...]
    value_dim: Expr
    j: Expr
    d: Expr
    width: Expr
    visible: Expr
    fills: frozenset[float]
    additive: bool
    in_sums: bool
    scale: float
    factors: tuple[Factor, ...]
    probability: Coords
    q: tuple[Node, Coords]
    k: tuple[Node, Coords]
    v: tuple[Node, Coords]
    zero_rows: bool
    settled: bool


@dataclass(frozen=True)
class Anchor:
    """A node on the way of the output, seen as four virtual dimensions."""

    node: Node
    sizes: tuple[Expr, ...]
    coords: tuple[Expr, ...]
    real: Coords


def _strip(e: Expr) -> tuple[float, bool, Expr]:
    """Constant factors and nan_to_num around an expression."""
    k, zeroed = 1.0, False
    while True:
        if e.op == "scaled":
            k, e = k * e.args[0], e.args[1]
        elif e.op == "opaque" and e.args[0] == "nan_to_0":
            zeroed, e = True, e.args[1][0]
        else:
            return k, zeroed, e


def normal_form(r: Reader, softmax: Node, contraction: Node, anchor: Anchor) -> NormalForm:
    alive, e = _rows_kept(r.read(anchor.node, anchor.real))
    factor, _, e = _strip(e)
    if e.op != "dot":
        raise Refusal(
            ReasonKind.NOT_ATTENTION,
            f"the output is not one contraction of probabilities and values but {x.show(e)[:80]}",
        )
    kept, multiplied, factors = _masked_after(e.args[1])
    stripped = [_strip(f) for f in factors]
    position = next((k for k, (_, _, p) in enumerate(stripped) if p.op == "softmax" and p.args[0] == softmax.name), None)
    if position is None or len(stripped) != 2:
        raise Refusal(ReasonKind.NOT_ATTENTION, "the output is not the product of these probabilities and values")
    by, zeroed, probability = stripped[position]
    if factor * by != 1:
        raise Refusal(ReasonKind.LOGITS, f"the probabilities are multiplied by {factor * by:g}")
    value_node, value_coords = r.operands[e][1 - position]
    assert value_node is not None
    coords, value_coords, j, width, kept = _key_variable(r, softmax, e, probability.args[1], value_coords, kept)
    jv = x.as_var(j)
    assert jv is not None
    logit = r.logit(softmax, coords)
    threshold = max(negligible(dtype(softmax)), negligible(dtype(value_node)))
    if r.is_quotient(softmax):
        threshold *= math.log(2)  # two to the -1e9 is a logit of -6.9e8
    visible, fills, additive, in_sums, product = _masked_product(r, logit, jv, threshold)
    empty = EmptyRow(fills, additive)
    if r.is_quotient(softmax):
        empty = empty_row(r, softmax, coords, jv, visible, empty, threshold)
    if kept is not x.TRUE and not _keeps_what_is_visible(kept, visible, jv):
        raise Refusal(ReasonKind.LOGITS, "the probabilities are masked behind the softmax by another mask than the logits")
    bound = product.rest.args[0]
    if len(bound) != 1:
        raise Refusal(ReasonKind.LOGITS, "the logits sum over several head dimensions")
    operands, factors = [], list(product.factors)
    for n, c in r.operands[product.rest]:
        if n is None or any(v in q.free for q in c for v in (jv, *bound)):
            operands.append((n, c))
        else:
            factors.append(Factor(n, c))
    if len(operands) != 2:
        raise Refusal(ReasonKind.LOGITS, "the logits contract more than a query and a key")
    keyed = [k for k, (_, c) in enumerate(operands) if any(jv in q.free for q in c)]
    if len(keyed) != 1:
        raise Refusal(ReasonKind.LOGITS, "both factors of the logits depend on the key")
    (kn, kc), (qn, qc) = operands[keyed[0]], operands[1 - keyed[0]]
    assert kn is not None and qn is not None
    _no_narrower_cast(contraction, (qn, kn, value_node))
    numbers = zeroed or empty.zero or op_name(softmax) in SAFE or empty.settled and -math.inf not in empty.fills  # no NaN
    zero_rows = empty.zero or kept is not x.TRUE and (numbers or not multiplied) or empty.fills == {-math.inf} and numbers
    if alive is not x.TRUE:
        shown = _shown(alive, visible, jv, width)
        if shown is None or shown is visible and not numbers:
            raise Refusal(ReasonKind.LOGITS, "rows of the output are set to zero, and not just those without a visible key")
        if shown is not visible:  # what is added to masked logits plays no part in rows that are shown keys for want of their own
            visible, empty, in_sums = shown, replace(empty, additive=False), False
        zero_rows = True
    rows = visible.free.union(*(c.free for c in (*coords, *qc, *(c for f in factors for c in f.coords))))
    spare = [o for o in anchor.coords if x.as_var(o) and x.as_var(o) not in rows]
    if len(spare) != 1:
        raise Refusal(ReasonKind.OPERANDS, "no single dimension of the output belongs to the values alone")
    return NormalForm(
        coords=anchor.coords, value_dim=spare[0], j=j, d=x.poly(bound[0]), width=width, visible=visible, fills=empty.fills,
        additive=empty.additive, in_sums=in_sums, scale=product.number, factors=tuple(factors),
        q=(qn, qc), k=(kn, kc), v=(value_node, value_coords), probability=coords, zero_rows=zero_rows, settled=empty.settled,
    )  # fmt: skip


def _rows_kept(e: Expr) -> tuple[Expr, Expr]:
    """When an element of the output is no zero that was put there, and what it is then."""
    leaves = list(x.cases(e))
    alive = [(g, t) for g, t in leaves if t is not x.real(0) and x.zero_times(t) is None]
    zeros = {z for _, t in leaves if (z := x.zero_times(t)) is not None}
    values = {t for _, t in alive}
    if len(leaves) == 1 or len(values) != 1 or not zeros <= values:
        return x.TRUE, e
    return x.disj(*(g for g, _ in alive)), values.pop()


def _shown(alive: Expr, visible: Expr, jv: Expr, width: Expr) -> Expr | None:
    """The keys that count, if the rows of the output that are not set to zero are those with such a key; otherwise None.

    Rows without one may have been shown all keys, ``mask | ~mask.any(-1, keepdim=True)``, so that they are no rows of NaN. These
    count no more than what masked logits get: nothing of such a row is left.
    """
    for shown in (visible, x.conj(alive, visible), _where(alive, x.TRUE, visible)):
        if _some_visible(alive, shown, jv) or _first_tells(alive, shown, jv, width):
            unmasked = x.substitute(_where(alive, x.FALSE, visible), {jv: x.ZERO})
            if shown is visible or _proven(x.disj(alive, x.conj(unmasked, x.less(x.ZERO, width)))):
                return shown
    return None


def _where(condition: Expr, value: Expr, e: Expr) -> Expr:
    """A formula where a condition is known to hold, or not to hold."""

    def go(t: object) -> object:
        if isinstance(t, tuple):
            return tuple(go(y) for y in t)
        if not isinstance(t, Expr) or t.sort != x.BOOL:
            return t
        if _same(t, condition):
            return value
        return x.negate(value) if t is x.negate(condition) else x.rebuild(t, go)

    out = go(e)
    assert isinstance(out, Expr)
    return out


def _same(a: Expr, b: Expr) -> bool:
    """Whether two formulas are one, but for the name of the variable that an ``exists`` binds."""
    if a is b or a.op != "exists" or b.op != "exists" or a.args[0].args[1] is not b.args[0].args[1]:
        return a is b
    return x.substitute(a.args[1], {a.args[0]: x.poly(b.args[0])}) is b.args[1]


def _first_tells(alive: Expr, visible: Expr, jv: Expr, width: Expr) -> bool:
    """Whether rows are kept exactly where they see some key, as the first key shows: it is visible if any is."""
    first = x.conj(x.substitute(visible, {jv: x.ZERO}), x.less(x.ZERO, width))
    return _proven(x.conj(x.implies(alive, first), x.implies(visible, alive)))


def _proven(goal: Expr) -> bool:
    return goal is x.TRUE or solve([], goal, 200) is None


def _no_narrower_cast(contraction: Node, operands: tuple[Node, Node, Node]) -> None:
    """Refuses if logits or probabilities are rounded to less than the operands hold: the op would not round.

    Raises:
        Refusal: Of kind DTYPE.
    """
    coarsest = max(torch.finfo(dtype(n)).eps for n in operands)
    between: dict[Node, bool] = {}

    def holds_operand(n: Node) -> bool:
        """Whether a node depends on an operand through real values; remembered in `between`."""
        if n in operands:
            return True
        if n not in between:
            between[n] = False
            between[n] = any([holds_operand(a) for a in n.all_input_nodes if is_tensor(a) and is_real(a)])
        return between[n]

    for a in contraction.all_input_nodes:
        if is_tensor(a):
            holds_operand(a)
    for n, inside in between.items():
        if inside and torch.finfo(dtype(n)).eps > coarsest:
            raise Refusal(
                ReasonKind.DTYPE,
                f"logits or probabilities are rounded to {dtype(n)}, less than queries, keys and values hold",
            )


def _keeps_what_is_visible(kept: Expr, visible: Expr, jv: Expr) -> bool:
    """Whether a mask behind the softmax changes nothing but rows that see no key, and makes those zero: it keeps every visible
    key, and nothing in a row without one."""
    some = next((t for t in x.walk(kept) if _some_visible(t, visible, jv)), None)
    if kept is some:
        return True
    goal = x.conj(x.implies(visible, kept), x.implies(kept, visible if some is None else x.disj(visible, some)))
    return solve([x.implies(visible, some)] if some is not None else [], goal, 200) is None


def _some_visible(kept: Expr, visible: Expr, jv: Expr) -> bool:
    """Whether probabilities are kept exactly in rows that see some key: ``where(mask.any(-1, keepdim=True), p, 0)``."""
    if kept.op != "exists" or kept.args[0].args[1] is not jv.args[1]:
        return False
    here = x.substitute(visible, {jv: x.poly(kept.args[0])})
    return here is kept.args[1] or solve([], x.iff(here, kept.args[1]), 200) is None


def _masked_after(factors: tuple[Expr, ...]) -> tuple[Expr, bool, list[Expr]]:
    """Probabilities set to zero behind the softmax: when they are kept, whether they are set to zero by a product, which does not
    remove a NaN, and the factors without that."""
    kept, multiplied, out = x.TRUE, False, []
    for f in factors:
        leaves = list(x.cases(f))
        alive = [(g, t) for g, t in leaves if t is not x.real(0) and x.zero_times(t) is None]
        values = {t for _, t in alive}
        zeros = {z for _, t in leaves if (z := x.zero_times(t)) is not None}
        if len(leaves) > 1 and len(values) == 1 and zeros <= values and _strip(next(iter(values)))[2].op == "softmax":
            kept, multiplied = x.disj(*(g for g, _ in alive)), bool(zeros)
            f = values.pop()
        out.append(f)
    return kept, multiplied, out


def _key_variable(
    r: Reader, softmax: Node, e: Expr, coords: Coords, value_coords: Coords, kept: Expr
) -> tuple[Coords, Coords, Expr, Expr, Expr]:
    """The variable that the output sums over, which must be the axis of the softmax.

    Gathered spellings may flatten (slot, offset) for the softmax and sum over both: those become one mixed-radix key.
    """
    source, axis = r.softmax_axis(softmax)
    width = r.shape(softmax.args[1])[-2] if source is softmax else r.shape(source)[axis]
    bound = e.args[0]
    if len(bound) == 1:
        j = x.poly(bound[0])
    else:
        flat = coords[axis]
        weight = dict(flat.args[1])
        ordered = sorted(bound, key=lambda v: -weight.get(v, 0))
        j, step, mapping = x.var(f"{softmax.name}.key", width), 1, {}
        for v in reversed(ordered):
            size = x.constant(v.args[1])
            if weight.get(v) != step or size is None:
                raise Refusal(ReasonKind.SOFTMAX_AXIS, "the output sums over axes that the softmax does not normalise together")
            mapping[v] = x.mod(x.floordiv(j, step), size)
            step *= size
        if x.constant(width) != step or flat.args[0] or len(weight) != len(ordered):
            raise Refusal(ReasonKind.SOFTMAX_AXIS, "the output sums over a part of what the softmax normalises")
        coords = tuple(x.substitute(c, mapping) for c in coords)
        value_coords = tuple(x.substitute(c, mapping) for c in value_coords)
        kept = x.substitute(kept, mapping)
    jv = x.as_var(j)
    if jv is not None and x.constant(x.minus(coords[axis], j)) is not None and jv.args[1] is not width:
        raise Refusal(ReasonKind.SOFTMAX_AXIS, "the softmax also normalises keys that the output leaves out, such as a sink")
    if coords[axis] is not j or jv is None or jv.args[1] is not width:
        raise Refusal(ReasonKind.SOFTMAX_AXIS, "the softmax does not run over the axis that the output sums over")
    if any(jv in c.free for k, c in enumerate(coords) if k != axis):
        raise Refusal(ReasonKind.SOFTMAX_AXIS, "the key stands on another axis than the softmax normalises")
    return coords, value_coords, j, width, kept


def _masked_product(
    r: Reader, logit: Expr, jv: Expr, threshold: float
) -> tuple[Expr, frozenset[float], bool, bool, Term]:
    """Split the cases of a logit into one product of queries and keys and constant fills, which may be added to the product.

    Terms free of the key shift a whole row and drop out of the softmax, if every visible key of the row gets them.
    """
    masked: list[tuple[Expr, float, list[Term]]] = []
    rows: list[tuple[Expr, float]] = []
    seen: list[tuple[Expr, Term, tuple[float, frozenset[Term]]]] = []
    for condition, leaf in x.cases(logit):
        summands = list(terms(r, leaf, jv))
        constants = [t for t in summands if t.rest.op == "const" and not t.factors]
        shift = sum(t.number * t.rest.args[0] for t in constants)
        data = [t for t in summands if t not in constants]
        if any(_masks(t, threshold) for t in data):
            raise Refusal(
                ReasonKind.LOGITS,
                "masked logits are multiplied by a run-time value: what becomes of the mask depends on its sign and size",
            )
        if shift <= threshold:
            masked.append((condition, shift, data))
            continue
        if not data and jv not in condition.free:
            rows.append((condition, shift))
            continue
        if shift < 0 and not data:
            raise Refusal(
                ReasonKind.FILL,
                f"masked logits get {shift:g}, which leaks probability: only -inf, finfo.min or <= -1e9 mask",
            )
        keyed = [t for t in data if jv in t.rest.free]
        if any(t.rest.op != "dot" for t in keyed) or len(keyed) != 1:
            other = next((t.rest for t in keyed if t.rest.op != "dot"), None)
            raise Refusal(ReasonKind.LOGITS, _logit_text(other, keyed))
        if not math.isfinite(shift):
            raise Refusal(ReasonKind.LOGITS, f"{shift} is added to the logits")
        seen.append((condition, keyed[0], (shift, frozenset(t for t in data if t not in keyed))))
    # Nested masks leave cases whose conditions exclude one another.
    if len({case[1:] for case in seen}) > 1:
        seen = [case for case in seen if _possible(case[0])]
    if len({fill for _, fill, _ in masked}) > 1:
        masked = [case for case in masked if _possible(case[0])]
    products, shifts = {product for _, product, _ in seen}, {shift for _, _, shift in seen}
    if len(products) != 1:
        raise Refusal(ReasonKind.LOGITS, f"the logits hold {len(products)} different products of queries and keys")
    if len(shifts) != 1:
        raise Refusal(ReasonKind.LOGITS, "some keys of a row get a term in their logits that others do not")
    (product,) = products
    visible, fills = x.disj(*(condition for condition, _, _ in seen)), frozenset(fill for _, fill, _ in masked)
    if rows:
        return *_refilled(rows, visible, jv), False, False, product
    in_sums = all([t for t in data if jv in t.rest.free] == [product] for _, _, data in masked)
    return visible, fills, any(data for _, _, data in masked), in_sums, product


def _possible(condition: Expr) -> bool:
    """Whether a condition may hold somewhere."""
    return solve([], x.negate(condition), 200) is not None


def _refilled(rows: list[tuple[Expr, float]], visible: Expr, jv: Expr) -> tuple[Expr, frozenset[float]]:
    """Rows that get a constant after the mask, ``where(mask.any(-1, keepdim=True), logits, 0)``: what is visible, and the constant.

    If these are the rows without a visible key, then what masked logits get plays no part in them.
    """
    constants = frozenset(c for _, c in rows)
    some = x.negate(x.disj(*(g for g, _ in rows)))
    inside = x.conj(*(g for g in (visible.args if visible.op == "and" else (visible,)) if g is not some))
    if len(constants) != 1 or not _some_visible(some, inside, jv):
        raise Refusal(ReasonKind.LOGITS, "whole rows of logits are replaced by a constant, and not just those without a visible key")
    return inside, constants


def _masks(t: Term, threshold: float) -> bool:
    """Whether a term that is no constant was one that masks before it was multiplied."""
    return t.number <= threshold or any(e.op == "const" and e.args[0] <= threshold for e in (t.rest, *_factors_of(t.rest)))


def _factors_of(e: Expr) -> tuple[Expr, ...]:
    return e.args[1] if e.op == "opaque" and e.args[0] in ("mul", "div") else ()


def _logit_text(other: Expr | None, keyed: list[Term]) -> str:
    if other is not None and other.op == "load" and len(keyed) == 1:
        return f"the logits are a run-time value ({other.args[0]}), not scale * <q, k>"
    if other is not None and other.op == "load":
        return f"a run-time value ({other.args[0]}) stands in the logits beside scale * <q, k>"
    if len(keyed) > 1:
        return "the logits are a sum of several products"
    return "the logits are not scale * <q, k>"
