"""What a rewrite replaces, cut out so that it can be run beside what replaces it.

The second line of defence does not look at forms and proofs at all. It takes the graph as the user wrote it, the tensors that
the op is given, and the node whose value the op replaces, and runs both ways on data: on made-up data when the graph is
compiled (`differential`), on the user's at the first call (`fsa_compile.verify`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, GraphModule, Node

from . import dynamo_graph as dg

if TYPE_CHECKING:
    from .legality import Placement


@dataclass(frozen=True, eq=False)
class Region:
    """A replaced part of a graph. Nodes are those of the copy that `Original` keeps.

    Attributes:
        name: The site as reports name it: ``"selected at model.py:41 (layers.3.attn)"``.
        output: The node that is replaced.
        operands: The tensors that the op is given as q, k and v, and the temperatures of q; a tensor that is several of them
            stands once.
        leaves: Where the region begins: the operands, or the nodes that hold their memory if that is written into on the way.
        path: What is computed from the leaves in real numbers on the way to the output: where gradients flow. If the replacement
            chooses keys itself, what chooses them is on it too.
        memory: Inputs of the slice that the path is written into.
        needed: Everything that the output or `arguments` are computed from, down to the leaves and to the inputs of the slice.
        replacement: What the rewrite puts in the place of the output, as a graph of its own.
        arguments: The nodes that `replacement` takes.
        dtype: Of the output.
        needs_grad: Whether gradients flow through the output.
    """

    name: str
    output: Node
    operands: tuple[Node, ...]
    leaves: tuple[Node, ...]
    path: frozenset[Node]
    memory: frozenset[Node]
    needed: frozenset[Node]
    replacement: Graph
    arguments: tuple[Node, ...]
    dtype: torch.dtype
    needs_grad: bool


class Original:
    """A copy of a graph, taken before anything in it is rewritten, with the regions that were.

    Args:
        gm: The graph. Neither it nor the bodies in it are changed.

    Attributes:
        module: The copy; its nodes have the metadata of the nodes that they are copies of, until `forget_metadata`.
        bodies: The copies of checkpoint bodies, by the attribute that holds them.
        regions: What was replaced so far.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._copies: dict[Node, Node] = {}
        graph = Graph()
        graph.output(graph.graph_copy(gm.graph, self._copies))
        self.module = GraphModule(gm, graph)
        self.module.meta.update(gm.meta)
        self.bodies = {name: Original(body) for name, body in dg.bodies(gm)}
        for name, body in self.bodies.items():
            setattr(self.module, name, body.module)
        self.regions: list[Region] = []

    def copy_of(self, n: Node) -> Node:
        """The copy of a node of the graph."""
        return self._copies[n]

    def attribute(self, path: str) -> object:
        """What a ``get_attr`` node of the copy stands for."""
        return attribute(self.module, path)

    def all_regions(self) -> list[Region]:
        """The regions of this graph and of the bodies in it."""
        return [*self.regions, *(r for body in self.bodies.values() for r in body.all_regions())]

    def forget_metadata(self) -> None:
        """Drop fake tensors, which must not outlive a compilation."""
        for n in self.module.graph.nodes:
            n.meta.clear()
        for body in self.bodies.values():
            body.forget_metadata()

    def cut(
        self,
        name: str,
        placement: Placement,
        emitted: Sequence[Node],
        result: Node,
        replaced: Mapping[Node, Node],
        chooses: bool = False,
    ) -> Region:
        """The region of one site.

        Args:
            name: What messages call it.
            placement: Where the site is, in the graph that is being rewritten.
            emitted: The nodes that the rewrite has written for it.
            result: The one of them that takes the place of the output.
            replaced: What earlier rewrites have put in the place of nodes of the graph.
            chooses: Whether the replacement chooses keys itself.
        """
        before = {new: old for old, new in replaced.items()}
        outside = list(dict.fromkeys(a for n in emitted for a in n.all_input_nodes if a not in set(emitted)))
        arguments = tuple(self._copies[before.get(a, a)] for a in outside)
        output = self._copies[placement.output]
        operands = tuple(dict.fromkeys(self._copies[n] for n in placement.operands))
        upstream = list(output.graph.nodes)[: list(output.graph.nodes).index(output) + 1]
        leaves = tuple(dict.fromkeys(_leaf(n, upstream) for n in operands))
        needed = _needed({output, *arguments}, set(leaves), upstream)
        path = _path(leaves, upstream, through_integers=chooses) & needed - set(leaves)
        memory = frozenset(n for n in path if is_root(n))
        value = dg.value(output)
        assert isinstance(value, torch.Tensor)
        return Region(
            name, output, operands, leaves, path - memory, memory, needed,
            _graph_of(outside, emitted, result), arguments, value.dtype, value.requires_grad,
        )  # fmt: skip


def attribute(module: GraphModule, path: str) -> object:
    """``module.a.b`` for ``"a.b"``."""
    value: object = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def is_root(n: Node) -> bool:
    """Whether a node is computed by something that no region looks through: its value is an input."""
    if n.op in ("placeholder", "get_attr", "call_module"):
        return True
    if dg.is_higher_order(n):
        return "flex_attention" not in dg.target_name(n)  # attention of its own, which may be a site
    return dg.is_cut(n)


def _graph_of(inputs: Iterable[Node], nodes: Iterable[Node], result: Node) -> Graph:
    graph = Graph()
    inner = {n: graph.placeholder(n.name) for n in inputs}
    for n in nodes:
        inner[n] = graph.node_copy(n, inner.__getitem__)
        inner[n].meta.clear()
    graph.output(inner[result])
    return graph


def _leaf(operand: Node, upstream: Sequence[Node]) -> Node:
    """The operand, or the first node that holds its memory if that is written into before the output is computed."""
    memory = dg.storage(operand)
    if memory is None or memory not in dg.written_storages(upstream[upstream.index(operand) + 1 :]):
        return operand
    return next(n for n in upstream if dg.storage(n) == memory)


def _needed(targets: set[Node], leaves: set[Node], upstream: Sequence[Node]) -> frozenset[Node]:
    stop = leaves | {n for n in upstream if is_root(n)}
    writers: dict[int, list[Node]] = {}
    for n in upstream:
        for a in dg.written_by(n) if n not in stop else ():
            memory = dg.storage(a)
            if memory is not None:
                writers.setdefault(memory, []).append(n)
    wanted = _ancestors(targets, stop)
    while True:  # a write into something wanted is wanted, with what it writes
        more = {w for n in wanted for w in writers.get(dg.storage(n) or -1, ())} - wanted
        if not more:
            return frozenset(wanted)
        wanted |= _ancestors(more, stop)


def _ancestors(nodes: Iterable[Node], stop: set[Node]) -> set[Node]:
    """`nodes` and all arguments of what they depend on, functions included, not going above `stop`."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo.extend(() if n in stop else n.all_input_nodes)
    return seen


def _path(leaves: Sequence[Node], upstream: Sequence[Node], through_integers: bool) -> frozenset[Node]:
    """What is computed from the leaves, including the memory that it is written into; not through integers unless asked."""
    path = set(leaves)
    memories: set[int] = set()
    while True:
        size = len(path), len(memories)
        for n in upstream:
            writes = dg.written_by(n)
            if not (through_integers or _is_real(n) or writes) or n in path and not writes:
                continue
            if dg.storage(n) in memories or any(a in path for a in n.all_input_nodes):
                path.add(n)
                memories |= {s for a in writes if a not in path and (s := dg.storage(a)) is not None}
        if (len(path), len(memories)) == size:
            return frozenset(path)


def _is_real(n: Node) -> bool:
    values = dg.value(n)
    parts = values if isinstance(values, (tuple, list)) else (values,)
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in parts)
