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
from .reader import Reader, op_name
from .refusal import Refusal
from .shadow import Shadow

_EVALUABLE = frozenset(
    "sum var size prod div mod if_int apply predicate load softmax true false not and or ge eq exists compare const float scaled".split()
)
"""What a block list may be made of for the rewrite to compute it: see `TensorEvaluator`."""


@dataclass(frozen=True)
class Placement:
    """Where a match goes in the Dynamo graph.

    Attributes:
        output: The node that the op's result replaces.
        q, k, v: The operands.
        data: For each shadow node that the block list reads: the Dynamo node that holds it.
    """

    output: Node
    q: Node
    k: Node
    v: Node
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
    data = {name: _holder(r, shadow, name) for name in sorted(_data_names(match))}
    order = {n: p for p, n in enumerate(output.graph.nodes)}
    for n in (q, k, v, *data.values()):
        if order[n] >= order[output]:
            raise Refusal(ReasonKind.OPERANDS, f"{n.name} is computed after the attention that needs it", source=dg.source_of(n))
    _not_written(output, (q, k, v, *data.values()), order)
    path = _between((q, k, v), output)
    _one_grad_mode(output, path)
    _no_hooks(path)
    return Placement(output, q, k, v, data)


def needs_grad(shadow: Shadow, n: Node) -> bool:
    """Whether gradients flow through a shadow node."""
    values = [dg.value(d) for d in shadow.standing_for.get(n, ())]
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in values) if values else True


def _data_names(match: Match) -> set[str]:
    """The shadow nodes that the block list reads."""
    blocks = match.candidate.blocks
    names: set[str] = set()
    for e in (blocks.entry, blocks.valid) if blocks is not None else ():
        for t in x.walk(e):
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


