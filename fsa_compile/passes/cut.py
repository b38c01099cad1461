"""Naming batch, heads and queries, and choosing how deep to take Q, K and V.

A cut below a `repeat_interleave` finds the grouped key heads; one above a tile, a roll or a flip keeps the user's tensor as
the operand, which is sound too. So the deepest cut at which K and V agree is taken first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.fx import Node

from ..report import ReasonKind
from . import expr as x
from .attention_form import AttentionForm, Operand
from .expr import Expr
from .layout import Layout, find_layout
from .nodes import dtype, op_name
from .normal_form import Anchor, NormalForm
from .operands import Step, chain
from .reader import Coords, Reader
from .refusal import Refusal
from .temperature import choose


def cut(r: Reader, softmax: Node, anchor: Anchor, raw: NormalForm, replaceable: frozenset[Node]) -> Iterator[AttentionForm]:
    """Name batch, heads and queries, and choose how deep to take Q, K and V."""
    rows = [o for o in raw.coords if o is not raw.value_dim]
    keys = _cuts(r, raw.k, raw.d, replaceable)
    vals = [s for s in _cuts(r, raw.v, raw.value_dim, replaceable) if s.factor == 1]
    queries = _cuts(r, raw.q, raw.d, replaceable)
    temperatures = tuple(choose(r, f, raw.q[0], replaceable) for f in raw.factors)
    heads_wrong = None
    found = counted = False
    for b, h, i in _assignments(raw, rows):
        size = {o: s for o, s in zip(anchor.coords, anchor.sizes)}
        hq = x.constant(size.get(h, x.ONE)) if h is not x.ZERO else 1
        if hq is None:
            continue
        counted = True
        bs, ns = (size[o] if o is not x.ZERO else x.ONE for o in (b, i))
        dv = size[raw.value_dim]
        for ks, vs in itertools.product(keys, vals):
            key, of_value = _key_coordinate(ks, raw), _key_coordinate(vs, raw)
            if key is None or of_value is None:
                continue
            length, values = r.shape(ks.node)[ks.coords.index(key)], r.shape(vs.node)[vs.coords.index(of_value)]
            if length is not values:
                r.sizes.want_equal(length, values)
            if length is not values or key is not of_value:
                continue
            pair = _head_layouts(r, ks, vs, (b, h, key), (bs, hq, length), raw, dv)
            if pair is None:
                heads_wrong = heads_wrong or _other_head_map(r, ks, (b, h, key), (bs, length), raw)
                continue
            kv_heads, kl, vl, dk = pair
            groups = hq // kv_heads
            for qs in queries:
                ql = _query_layout(r, qs.node, qs.coords, (b, h, i, raw.d), (bs, x.integer(hq), ns, dk), groups)
                if ql is None or qs.guard is not x.TRUE:
                    continue
                out = _query_layout(r, anchor.node, anchor.real, (b, h, i, raw.value_dim), (bs, x.integer(hq), ns, dv), groups)
                if out is None:
                    continue
                found = True
                yield AttentionForm(
                    softmax=softmax.name, output=anchor.node.name, output_layout=out, b=b, h=h, i=i, j=raw.j,
                    sizes=(bs, x.integer(hq), ns, dk, dv), width=raw.width, visible=raw.visible, fills=raw.fills,
                    additive=raw.additive, in_sums=raw.in_sums, scale=raw.scale * qs.factor * ks.factor, temperatures=temperatures,
                    key=key, guard=x.conj(ks.guard, vs.guard), keys=length,
                    kv_heads=kv_heads, q=Operand(qs.node.name, ql, dtype(raw.q[0])),
                    k=Operand(ks.node.name, kl, dtype(raw.k[0])), v=Operand(vs.node.name, vl, dtype(raw.v[0])),
                    probability=raw.probability, zero_rows=raw.zero_rows, settled=raw.settled,
                )  # fmt: skip
                break
            else:
                raise Refusal(ReasonKind.OPERANDS, "the queries have no view as (batch, heads, queries, head dim)")
    if not found:
        _want_numbers(r, raw, rows)
        if not counted:
            raise Refusal(ReasonKind.SHAPE, "the number of heads is dynamic")
        if heads_wrong is not None:
            raise Refusal(ReasonKind.HEAD_MAP, f"query head h reads key/value head {x.show(heads_wrong)}, which is not h // G")
        raise _different_places(r, raw)


def _want_numbers(r: Reader, raw: NormalForm, rows: list[Expr]) -> None:
    """Heads and their dimensions, which the ops know as numbers: the last of the output's dimensions that keys have too."""
    places = [s for place in (raw.q, raw.k, raw.v) for s in chain(r, *place)]
    own = [c for c in chain(r, *raw.k)[-1].coords if not any(t.op == "apply" for t in x.walk(c))]
    of_keys = [v for v in map(x.as_var, rows) if v is not None and any(v in c.free for c in own)]
    sizes = [v.args[1] for v in (*of_keys[-1:], x.as_var(raw.d), x.as_var(raw.value_dim)) if v is not None]
    sizes += [size for s in places for c, size in zip(s.coords, r.shape(s.node)) if c.free & set(of_keys[-1:])]
    for size in sizes:
        r.sizes.want_number(size)


def _other_head_map(
    r: Reader, ks: Step, where: tuple[Expr, Expr, Expr], extent: tuple[Expr, Expr], raw: NormalForm
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


def _different_places(r: Reader, raw: NormalForm) -> Refusal:
    """Why no cut of K and V fits."""
    deepest_k, deepest_v = chain(r, *raw.k)[-1], chain(r, *raw.v)[-1]
    if op_name(deepest_k.node) in ("mul", "multiply") and deepest_v.node is not deepest_k.node:
        gathered = any(t.op == "apply" for c in deepest_v.coords for t in x.walk(c))
        if gathered:
            return Refusal(
                ReasonKind.GRADIENT,
                "the gathered keys are multiplied by run-time factors before the logits; "
                "the op would drop them and their gradient",
            )
    return Refusal(
        ReasonKind.OPERANDS, "the keys that the logits see and the values that are summed do not come from one place in one order"
    )


def _query_layout(
    r: Reader, n: Node, coords: Coords, targets: tuple[Expr, ...], sizes: tuple[Expr, ...], groups: int
) -> Layout | None:
    """How a node holds queries or outputs ``(b, hq, n, d)``; the heads may be two dimensions, in either order, and the queries
    chunks."""
    i = targets[2]
    chunks = {x.constant(t.args[1]) for c in coords for t in x.walk(c) if t.op in ("div", "mod") and t.args[0] is i}
    heads = ((), ((1, groups),)) if groups > 1 else ((),)
    queries = ((), *(((2, c),) for c in sorted(c for c in chunks if c is not None)))
    found = (find_layout(coords, r.shape(n), targets, sizes, (*h, *q)) for h, q in itertools.product(heads, queries))
    return next((layout for layout in found if layout is not None), None)


def _assignments(raw: NormalForm, rows: list[Expr]) -> Iterator[tuple[Expr, Expr, Expr]]:
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


def _cuts(r: Reader, operand: tuple[Node, Coords], d: Expr, replaceable: frozenset[Node]) -> list[Step]:
    """Where an operand may be taken, the deepest first; last where the head dimension ``d`` is folded together with the heads."""
    steps = [s for s in reversed(chain(r, *operand)) if s.node in replaceable]
    folded = [s for s in steps if d not in s.coords and any(x.as_var(d) in c.free for c in s.coords)]
    return [*(s for s in steps if d in s.coords), *folded]


def _key_coordinate(s: Step, raw: NormalForm) -> Expr | None:
    jv = x.as_var(raw.j)
    with_key = [c for c in s.coords if jv in c.free]
    return with_key[0] if len(with_key) == 1 else None


def _head_layouts(
    r: Reader, ks: Step, vs: Step, where: tuple[Expr, Expr, Expr], extent: tuple[Expr, int, Expr], raw: NormalForm, dv: Expr
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
