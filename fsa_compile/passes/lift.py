"""From a softmax between two contractions to one normal form, whatever the spelling.

::

    logit(b, h, i, j) = scale * sum_d Q[b, h, i, d] * K[b, h // G, key(b, h, i, j), d]   if visible(b, h, i, j)
                      = a fill                                                         otherwise
    out(b, h, i, :)   = sum_j softmax_j(logit) * V[b, h // G, key(b, h, i, j), :]

`lift` yields candidates: the cut below Q, K and V is a search (a deeper cut finds the grouped key heads), and so is the
view of the output. Each is a sound description of the same computation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..report import ReasonKind
from . import expr as x
from .expr import Expr
from .layout import Layout, find_layout
from .reader import Coords, Reader, Step, dtype, is_real, is_tensor, op_name
from .refusal import Refusal
from .smt import solve


def negligible(dt: torch.dtype) -> float:
    """A finite fill at or below this counts as -inf: -1e9, or a tenth of finfo.min where that is less (float16)."""
    return max(-1e9, torch.finfo(dt).min / 10)


SAFE = ("scaled_dot_product_attention", "_safe_softmax")
"""Softmaxes that give zeros, not NaN, for a row of -inf."""

INDEX_OPS = frozenset(
    "view reshape _unsafe_view permute transpose clone contiguous slice squeeze unsqueeze movedim alias unflatten "
    "flatten _to_copy to".split()
)


@dataclass(frozen=True)
class Operand:
    """Q, K or V: a node, how it holds the canonical tensor, and the dtype in which it is used.

    Attributes:
        node: Name of the shadow node.
        layout: Its dimensions as ``(b, h, n, d)``.
        dtype: The dtype at the contraction, where autocast or the model has cast it.
    """

    node: str
    layout: Layout
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionForm:
    """The normal form of one attention site.

    Attributes:
        softmax: Name of the shadow node that normalises.
        output: Name of the shadow node that the op's result replaces.
        output_layout: Its dimensions as ``(b, hq, n, dv)``.
        b, h, i, j: The coordinates: batch, query head, query, and index of the key as the spelling counts it.
        sizes: ``(b, hq, n, dk, dv)``.
        width: How many key indices the softmax runs over.
        visible: When the logit is ``scale * <q, k>``; otherwise it is one of `fills`.
        fills: The constants that masked logits get.
        additive: Whether a fill is added to the product (its gradient then flows) instead of replacing it.
        scale: What multiplies the product.
        key: The position in K and V of key index j.
        guard: When that position is real and not padding.
        keys: The length of K and V.
        kv_heads: The number of heads of K and V.
        q, k, v: The operands.
        zero_rows: Whether a row that sees nothing gives zeros (SDPA, nan_to_num or a second mask behind the softmax).
    """

    softmax: str
    output: str
    output_layout: Layout
    b: Expr
    h: Expr
    i: Expr
    j: Expr
    sizes: tuple[Expr, ...]
    width: Expr
    visible: Expr
    fills: frozenset[float]
    additive: bool
    scale: float
    key: Expr
    guard: Expr
    keys: Expr
    kv_heads: int
    q: Operand
    k: Operand
    v: Operand
    zero_rows: bool

    @property
    def groups(self) -> int:
        """G: query heads per key/value head."""
        hq = x.constant(self.sizes[1])
        assert hq is not None
        return hq // self.kv_heads


@dataclass(frozen=True)
class _Raw:
    """Lifted, but not yet cut: what is known before heads and batch have names."""

    coords: tuple[Expr, ...]
    value_dim: Expr
    j: Expr
    d: Expr
    width: Expr
    visible: Expr
    fills: frozenset[float]
    additive: bool
    scale: float
    q: tuple[Node, Coords]
    k: tuple[Node, Coords]
    v: tuple[Node, Coords]
    zero_rows: bool


@dataclass(frozen=True)
class _Anchor:
    """A node on the way of the output, seen as four virtual dimensions."""

    node: Node
    sizes: tuple[Expr, ...]
    coords: tuple[Expr, ...]
    real: Coords


def lift(r: Reader, softmax: Node, contraction: Node, replaceable: frozenset[Node]) -> Iterator[AttentionForm]:
    """The candidate forms of the site, the most useful first.

    Args:
        r: Reader of the shadow graph.
        softmax: The node that normalises (or the SDPA node).
        contraction: The node that multiplies the probabilities with the values.
        replaceable: Shadow nodes that stand for a node of the Dynamo graph: only these can be operands or output.

    Raises:
        Refusal: If no candidate exists.
    """
    refusals: list[Refusal] = []
    found = False
    for anchor in _anchors(r, contraction, replaceable):
        try:
            raw = _normal_form(r, softmax, contraction, anchor)
            for form in _cut(r, softmax, anchor, raw, replaceable):
                found = True
                yield form
        except Refusal as refusal:
            refusals.append(refusal)
    if not found:
        if refusals:
            raise refusals[0]
        raise Refusal(ReasonKind.SHAPE, "the output has no view as (batch, heads, queries, values)")


def _anchors(r: Reader, n: Node, replaceable: frozenset[Node]) -> Iterator[_Anchor]:
    """Nodes that hold the output, the deepest first: the contraction and the index ops that only it feeds."""
    path = [n]
    while len(path[-1].users) == 1:
        (user,) = path[-1].users
        if op_name(user) not in INDEX_OPS:
            break
        path.append(user)
    for node in sorted(reversed(path), key=lambda p: r_rank(p) != 4):
        if node in replaceable:
            yield from _virtual(r, node)


def r_rank(n: Node) -> int:
    return n.meta["val"].dim()


def _virtual(r: Reader, n: Node) -> Iterator[_Anchor]:
    shape = r.shape(n)

    def fresh(sizes: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(x.var(f"o{k}", s) if s is not x.ONE else x.ZERO for k, s in enumerate(sizes))

    if len(shape) == 4:
        o = fresh(shape)
        yield _Anchor(n, shape, o, o)
    elif len(shape) == 3:
        sizes = (x.ONE, *shape)
        o = fresh(sizes)
        yield _Anchor(n, sizes, o, o[1:])
    elif len(shape) == 5:  # grouped heads: (b, h, g, n, d) and (b, n, h, g, d)
        for k in (1, 2):
            sizes = (*shape[:k], x.times(shape[k], shape[k + 1]), *shape[k + 2 :])
            o = fresh(sizes)
            yield _Anchor(n, sizes, o, (*o[:k], x.floordiv(o[k], shape[k + 1]), x.mod(o[k], shape[k + 1]), *o[k + 1 :]))


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


def _terms(e: Expr, k: float = 1.0) -> list[tuple[float, Expr]]:
    if e.op == "add":
        return _terms(e.args[0], k) + _terms(e.args[1], k)
    if e.op == "scaled":
        return _terms(e.args[1], k * e.args[0])
    return [(k, e)]


def _normal_form(r: Reader, softmax: Node, contraction: Node, anchor: _Anchor) -> _Raw:
    factor, _, e = _strip(r.read(anchor.node, anchor.real))
    if e.op != "dot":
        raise Refusal(ReasonKind.NOT_ATTENTION, f"the output is not one contraction of probabilities and values but {x.show(e)[:80]}")
    kept, factors = _masked_after(e.args[1], softmax)
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
    visible, fills, additive, scale, product = _masked_product(logit, jv, negligible(dtype(softmax)))
    if kept is not x.TRUE and solve([], x.iff(kept, visible), 200) is not None:
        raise Refusal(ReasonKind.LOGITS, "the probabilities are masked behind the softmax by another mask than the logits")
    if len(product.args[0]) != 1:
        raise Refusal(ReasonKind.LOGITS, "the logits sum over several head dimensions")
    operands = r.operands[product]
    if len(operands) != 2:
        raise Refusal(ReasonKind.LOGITS, "the logits contract more than a query and a key")
    keyed = [k for k, (_, c) in enumerate(operands) if any(jv in q.free for q in c)]
    if len(keyed) != 1:
        raise Refusal(ReasonKind.LOGITS, "both factors of the logits depend on the key")
    (kn, kc), (qn, qc) = operands[keyed[0]], operands[1 - keyed[0]]
    assert kn is not None and qn is not None
    _no_narrower_cast(contraction, (qn, kn, value_node))
    rows = visible.free.union(*(c.free for c in (*coords, *qc)))
    spare = [o for o in anchor.coords if x.as_var(o) and x.as_var(o) not in rows]
    if len(spare) != 1:
        raise Refusal(ReasonKind.OPERANDS, "no single dimension of the output belongs to the values alone")
    return _Raw(
        coords=anchor.coords, value_dim=spare[0], j=j, d=x.poly(product.args[0][0]), width=width, visible=visible, fills=fills,
        additive=additive, scale=scale, q=(qn, qc), k=(kn, kc), v=(value_node, value_coords),
        zero_rows=kept is not x.TRUE or fills == {-math.inf} and (zeroed or op_name(softmax) in SAFE),
    )  # fmt: skip


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
            raise Refusal(ReasonKind.DTYPE, f"logits or probabilities are rounded to {dtype(n)}, less than queries, keys and values hold")


def _masked_after(factors: tuple[Expr, ...], softmax: Node) -> tuple[Expr, list[Expr]]:
    """Probabilities set to zero behind the softmax: when they are kept, and the factors without that."""
    kept, out = x.TRUE, []
    for f in factors:
        leaves = list(x.cases(f))
        alive = [(g, t) for g, t in leaves if t is not x.real(0)]
        values = {t for _, t in alive}
        if len(leaves) > 1 and len(values) == 1 and _strip(next(iter(values)))[2].op == "softmax":
            kept = x.disj(*(g for g, _ in alive))
            f = values.pop()
        out.append(f)
    return kept, out


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
    if coords[axis] is not j or jv is None or jv.args[1] is not width:
        raise Refusal(ReasonKind.SOFTMAX_AXIS, "the softmax does not run over the axis that the output sums over")
    if any(jv in c.free for k, c in enumerate(coords) if k != axis):
        raise Refusal(ReasonKind.SOFTMAX_AXIS, "the key stands on another axis than the softmax normalises")
    return coords, value_coords, j, width, kept


def _masked_product(logit: Expr, jv: Expr, threshold: float) -> tuple[Expr, frozenset[float], bool, float, Expr]:
    """Split the cases of a logit into scale * <q, k> and constant fills, which may be added to the product.

    Terms free of the key shift a whole row and drop out of the softmax, if every visible key of the row gets them.
    """
    additive = False
    visible: list[Expr] = []
    fills: set[float] = set()
    products: set[tuple[float, Expr]] = set()
    shifts: set[tuple[float, frozenset[tuple[float, Expr]]]] = set()
    for condition, leaf in x.cases(logit):
        terms = _terms(leaf)
        shift = sum(k * t.args[0] for k, t in terms if t.op == "const")
        data = [(k, t) for k, t in terms if t.op != "const"]
        if shift <= threshold:
            fills.add(shift)
            additive |= bool(data)
            continue
        if shift < 0 and not data:
            raise Refusal(ReasonKind.FILL, f"masked logits get {shift:g}, which leaks probability: only -inf, finfo.min or <= -1e9 mask")
        keyed = [(k, t) for k, t in data if jv in t.free]
        if any(t.op != "dot" for _, t in keyed) or len(keyed) != 1:
            other = next((t for _, t in keyed if t.op != "dot"), None)
            raise Refusal(ReasonKind.LOGITS, _logit_text(other, keyed))
        products.add(keyed[0])
        shifts.add((shift, frozenset(t for t in data if t not in keyed)))
        visible.append(condition)
    if len(products) != 1:
        raise Refusal(ReasonKind.LOGITS, f"the logits hold {len(products)} different products of queries and keys")
    if len(shifts) != 1:
        raise Refusal(ReasonKind.LOGITS, "some keys of a row get a term in their logits that others do not")
    ((scale, product),) = products
    return x.disj(*visible), frozenset(fills), additive, scale, product


def _logit_text(other: Expr | None, keyed: list[tuple[float, Expr]]) -> str:
    if other is not None and other.op == "load":
        return f"a run-time value ({other.args[0]}) stands in the logits beside scale * <q, k>"
    if len(keyed) > 1:
        return "the logits are a sum of several products"
    return "the logits are not scale * <q, k>"


def _cut(r: Reader, softmax: Node, anchor: _Anchor, raw: _Raw, replaceable: frozenset[Node]) -> Iterator[AttentionForm]:
    """Name batch, heads and queries, and choose how deep to take Q, K and V."""
    rows = [o for o in raw.coords if o is not raw.value_dim]
    keys = [s for s in reversed(r.chain(*raw.k)) if s.node in replaceable and raw.d in s.coords]
    vals = [s for s in reversed(r.chain(*raw.v)) if s.node in replaceable and raw.value_dim in s.coords and s.factor == 1]
    queries = [s for s in reversed(r.chain(*raw.q)) if s.node in replaceable and raw.d in s.coords]
    heads_wrong = None
    found = False
    for b, h, i in _assignments(raw, rows):
        size = {o: s for o, s in zip(anchor.coords, anchor.sizes)}
        hq = x.constant(size.get(h, x.ONE)) if h is not x.ZERO else 1
        if hq is None:
            continue
        bs, ns = (size[o] if o is not x.ZERO else x.ONE for o in (b, i))
        dv = size[raw.value_dim]
        for ks, vs in itertools.product(keys, vals):
            key = _key_coordinate(ks, raw)
            if key is None or key is not _key_coordinate(vs, raw):
                continue
            length = r.shape(ks.node)[ks.coords.index(key)]
            if r.shape(vs.node)[vs.coords.index(key)] is not length:
                continue
            pair = _head_layouts(r, ks, vs, (b, h, key), (bs, hq, length), raw, dv)
            if pair is None:
                heads_wrong = heads_wrong or _other_head_map(r, ks, (b, h, key), (bs, length), raw)
                continue
            kv_heads, kl, vl, dk = pair
            for qs in queries:
                ql = find_layout(qs.coords, r.shape(qs.node), (b, h, i, raw.d), (bs, x.integer(hq), ns, dk))
                if ql is None or qs.guard is not x.TRUE:
                    continue
                out = find_layout(anchor.real, r.shape(anchor.node), (b, h, i, raw.value_dim), (bs, x.integer(hq), ns, dv))
                if out is None:
                    out = _grouped_layout(anchor, (b, h, i, raw.value_dim))
                if out is None:
                    continue
                found = True
                yield AttentionForm(
                    softmax=softmax.name, output=anchor.node.name, output_layout=out, b=b, h=h, i=i, j=raw.j,
                    sizes=(bs, x.integer(hq), ns, dk, dv), width=raw.width, visible=raw.visible, fills=raw.fills,
                    additive=raw.additive,
                    scale=raw.scale * qs.factor * ks.factor, key=key, guard=x.conj(ks.guard, vs.guard), keys=length,
                    kv_heads=kv_heads, q=Operand(qs.node.name, ql, dtype(raw.q[0])),
                    k=Operand(ks.node.name, kl, dtype(raw.k[0])), v=Operand(vs.node.name, vl, dtype(raw.v[0])),
                    zero_rows=raw.zero_rows,
                )  # fmt: skip
                break
            else:
                raise Refusal(ReasonKind.OPERANDS, "the queries have no view as (batch, heads, queries, head dim)")
    if not found:
        if heads_wrong is not None:
            raise Refusal(ReasonKind.HEAD_MAP, f"query head h reads key/value head {x.show(heads_wrong)}, which is not h // G")
        raise _different_places(r, raw)


def _other_head_map(
    r: Reader, ks: Step, where: tuple[Expr, Expr, Expr], extent: tuple[Expr, Expr], raw: _Raw
) -> Expr | None:
    """The key/value head that the query head reads, if that is the only thing that does not fit."""
    b, h, key = where
    shape = r.shape(ks.node)
    d = x.as_var(raw.d)
    for c, size in zip(ks.coords, shape):
        if c is not key and d is not None and x.as_var(h) in c.free and not any(t.op == "apply" for t in x.walk(c)):
            if find_layout(ks.coords, shape, (b, c, key, raw.d), (extent[0], size, extent[1], d.args[1])) is not None:
                return c
    return None


def _different_places(r: Reader, raw: _Raw) -> Refusal:
    """Why no cut of K and V fits."""
    deepest_k, deepest_v = r.chain(*raw.k)[-1], r.chain(*raw.v)[-1]
    if op_name(deepest_k.node) in ("mul", "multiply") and deepest_v.node is not deepest_k.node:
        gathered = any(t.op == "apply" for c in deepest_v.coords for t in x.walk(c))
        if gathered:
            return Refusal(
                ReasonKind.GRADIENT,
                "the gathered keys are multiplied by run-time factors before the logits; the op would drop them and their gradient",
            )
    return Refusal(
        ReasonKind.OPERANDS, "the keys that the logits see and the values that are summed do not come from one place in one order"
    )


def _grouped_layout(anchor: _Anchor, targets: tuple[Expr, ...]) -> Layout | None:
    """Layout of a five-dimensional output whose heads are two dimensions: described after folding them."""
    if len(anchor.real) != 5:
        return None
    order = [next(k for k, t in enumerate(targets) if t is o) for o in anchor.coords]
    return Layout(tuple((k,) for k in order), 4) if sorted(order) == [0, 1, 2, 3] else None


def _assignments(raw: _Raw, rows: list[Expr]) -> Iterator[tuple[Expr, Expr, Expr]]:
    """(b, h, i) in the order in which they are likely: the query is compared with the key in the mask."""
    jv = x.as_var(raw.j)
    paired: set[Expr] = set()
    for t in x.walk(raw.visible):
        if t.op in ("ge", "eq") and jv in t.free:
            paired |= t.free
    ranked = sorted(
        itertools.permutations(rows), key=lambda p: (x.as_var(p[2]) not in paired, [rows.index(o) for o in p])
    )
    seen = set()
    for p in ranked:
        if p not in seen:
            seen.add(p)
            yield p  # type: ignore[misc]


def _key_coordinate(s: Step, raw: _Raw) -> Expr | None:
    jv = x.as_var(raw.j)
    with_key = [c for c in s.coords if jv in c.free]
    return with_key[0] if len(with_key) == 1 else None


def _head_layouts(
    r: Reader, ks: Step, vs: Step, where: tuple[Expr, Expr, Expr], extent: tuple[Expr, int, Expr], raw: _Raw, dv: Expr
) -> tuple[int, Layout, Layout, Expr] | None:
    """The largest group size under which both K and V are (b, h // G, key, d): (kv heads, layouts, dk)."""
    b, h, key = where
    bs, hq, length = extent
    d = x.as_var(raw.d)
    assert d is not None
    dk = d.args[1]
    for kv_heads in range(1, hq + 1):
        if hq % kv_heads:
            continue
        kv = x.floordiv(h, hq // kv_heads)
        lead = (bs, x.integer(kv_heads), length)
        kl = find_layout(ks.coords, r.shape(ks.node), (b, kv, key, raw.d), (*lead, dk))
        vl = find_layout(vs.coords, r.shape(vs.node), (b, kv, key, raw.value_dim), (*lead, dv))
        if kl is not None and vl is not None:
            return kv_heads, kl, vl, dk
    return None


