"""Whether a proven site may be replaced where it stands in the Dynamo graph.

The proof says what the site computes. This module says that the op, put in the place of the site's last node, reads the
same values and gives the same gradients: operands exist and are not written in between, one grad mode, no hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..report import ReasonKind
from . import dynamo_graph as dg
from . import expr as x
from .classify import Match
from .expr import Expr
from .reader import Reader, op_name
from .refusal import Refusal
from .shadow import Shadow

_EVALUABLE = frozenset(
    "sum var size prod div mod if_int apply predicate load softmax true false not and or ge eq exists compare const float scaled".split()
)
"""What a block list may be made of for the rewrite to compute it: see `TensorEvaluator`."""


@dataclass(frozen=True)
class ListTensor:
    """A block list as an expression over the four axes of a tensor.

    Attributes:
        axes: The variables: batch, head, query, slot.
        sizes: ``(b, hkv or hq, n, t)``.
        entry: The block number, -1 where a slot does not count.
    """

    axes: tuple[Expr, ...]
    sizes: tuple[Expr, ...]
    entry: Expr


@dataclass(frozen=True)
class Placement:
    """Where a match goes in the Dynamo graph.

    Attributes:
        output: The node that the op's result replaces.
        q, k, v: The operands.
        blocks: The block list, if the role has one.
        data: For each shadow node that the block list reads: the Dynamo node that holds it.
    """

    output: Node
    q: Node
    k: Node
    v: Node
    blocks: ListTensor | None
    data: dict[str, Node]


def place(r: Reader, shadow: Shadow, match: Match) -> Placement:
    """The Dynamo nodes of a match, if it is legal to replace them.

    Raises:
        Refusal: If it is not.
    """
    form = match.form

    def first(name: str) -> Node:
        return shadow.standing_for[r.nodes[name]][0]

    output = first(form.output)
    q, k, v = (first(o.node) for o in (form.q, form.k, form.v))
    blocks = _list_tensor(r, shadow, match)
    data = {name: _holder(r, shadow, name) for name in sorted(_data_names(blocks))}
    order = {n: p for p, n in enumerate(output.graph.nodes)}
    for n in (q, k, v, *data.values()):
        if order[n] >= order[output]:
            raise Refusal(ReasonKind.OPERANDS, f"{n.name} is computed after the attention that needs it", source=dg.source_of(n))
    _not_written(output, (q, k, v, *data.values()), order)
    path = _between((q, k, v), output)
    _one_grad_mode(output, path)
    _no_hooks(path)
    return Placement(output, q, k, v, blocks, data)


def needs_grad(shadow: Shadow, n: Node) -> bool:
    """Whether gradients flow through a shadow node."""
    values = [dg.value(d) for d in shadow.standing_for.get(n, ())]
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in values) if values else True


def _list_tensor(r: Reader, shadow: Shadow, match: Match) -> ListTensor | None:
    """The block list over tensor axes, in terms of the user's own integer and truth tensors where they hold it."""
    blocks, form = match.candidate.blocks, match.form
    if blocks is None:
        return None
    heads = form.groups * form.kv_heads if blocks.per_query_head else form.kv_heads
    head = x.var("list_head", heads) if heads > 1 else x.ZERO
    slot = x.as_var(blocks.slot)
    h = x.as_var(form.h)
    mapping = {h: head if blocks.per_query_head else x.times(head, form.groups)} if h is not None else {}
    entry = x.select(_with_origins(r, shadow, blocks.valid, mapping), _with_origins(r, shadow, blocks.entry, mapping), x.integer(-1))
    axes = tuple(e if x.as_var(e) is not None else x.var(f"unit{k}", 2) for k, e in enumerate((form.b, head, form.i, blocks.slot)))
    sizes = (form.sizes[0], x.integer(heads), form.sizes[2], slot.args[1] if slot is not None else x.ONE)
    return ListTensor(tuple(e.args[1][0][0] for e in axes), sizes, entry)


def _with_origins(r: Reader, shadow: Shadow, e: Expr, mapping: dict[Expr, Expr]) -> Expr:
    """`e` after `mapping`, with sub-expressions that a node of the model's own graph holds replaced by that node.

    This keeps the user's own list instead of computing it again, and finds it where its ingredients are gone because they
    were overwritten in place.
    """
    memo: dict[Expr, Expr] = {}

    def go(t: object) -> object:
        if isinstance(t, tuple):
            return tuple(go(y) for y in t)
        if not isinstance(t, Expr) or t.sort == x.REAL or t.op == "var":
            return x.substitute(t, mapping) if isinstance(t, Expr) else t
        if t not in memo:
            held = _held(t if t.op != "apply" else x.poly(t))
            memo[t] = held if held is not None else x.rebuild(t, go) if t.free else t
        return memo[t]

    def _held(t: Expr) -> Expr | None:
        if not any(y.op in ("apply", "predicate", "compare") for y in x.walk(t)):
            return None
        found = [
            (n, tuple(x.substitute(c, mapping) for c in coords))
            for n, coords in r.origins.get(t, ())
            if n in shadow.standing_for
        ]
        for n, coords in sorted(found, key=lambda f: sum(x.as_var(c) is None and c is not x.ZERO for c in f[1])):
            return x.predicate(n.name, coords) if t.sort == x.BOOL else x.apply(n.name, coords, t.lo, t.hi)
        return None

    out = go(e)
    assert isinstance(out, Expr)
    return out


def _data_names(blocks: ListTensor | None) -> set[str]:
    """The shadow nodes that the block list reads."""
    names: set[str] = set()
    for t in x.walk(blocks.entry) if blocks is not None else ():
        if t.op not in _EVALUABLE:
            raise Refusal(ReasonKind.MASK, f"the block list holds {t.op}, which the rewrite cannot compute")
        if t.op in ("apply", "predicate", "load", "softmax"):
            names.add(str(t.args[0]))
    return names


def _holder(r: Reader, shadow: Shadow, name: str) -> Node:
    n = r.nodes[name]
    if name in r.tops:  # indices are the second result
        n = next((u for u in n.users if op_name(u) == "getitem" and u.args[1] == 1), n)
    if n not in shadow.standing_for:
        raise Refusal(ReasonKind.OPERANDS, f"{name}, which the block list reads, is no value of the model's own graph")
    return shadow.standing_for[n][0]


def _not_written(output: Node, operands: Iterable[Node], order: dict[Node, int]) -> None:
    """The shadow map knows final values: a write is fine before the op, and wrong after it."""
    written = dg.written_storages(output.graph.nodes)
    for n in (output, *operands):
        writer = written.get(dg.storage(n) or -1)
        if writer is not None and (order[writer] > order[output] or n is output):
            raise Refusal(
                ReasonKind.MUTATION, f"{n.name} is written in place by {dg.target_name(writer)}", source=dg.source_of(writer)
            )


def _between(operands: Iterable[Node], output: Node) -> set[Node]:
    """Real-valued nodes on a way from an operand to the output, the output included."""
    below = dg.ancestors([output], frozenset(operands))
    reached: set[Node] = set()
    todo = [n for n in operands]
    while todo:
        for u in todo.pop().users:
            if u in below and u not in reached and _is_real(u):
                reached.add(u)
                todo.append(u)
    return reached - set(operands)


def _is_real(n: Node) -> bool:
    v = dg.value(n)
    return not isinstance(v, torch.Tensor) or v.is_floating_point()


def _one_grad_mode(output: Node, path: set[Node]) -> None:
    state: object = None
    modes: dict[Node, object] = {}
    for n in output.graph.nodes:
        if dg.target_name(n) == "_set_grad_enabled":
            state = n.args[0]
        modes[n] = state
    for n in sorted(path, key=list(modes).index):
        if modes[n] != modes[output]:
            raise Refusal(ReasonKind.GRADIENT, "the attention is computed partly without gradients", source=dg.source_of(n))


def _no_hooks(path: set[Node]) -> None:
    for n in path:
        for u in n.users:
            if dg.target_name(u) in ("register_hook", "retain_grad", "register_post_accumulate_grad_hook"):
                raise Refusal(ReasonKind.GRADIENT, f"{n.name} has a gradient hook", source=dg.source_of(u))


