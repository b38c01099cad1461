"""The parts of a Dynamo graph around attention, and which of them are repetitions of another.

Tracing and proving cost milliseconds a node, and a model of 32 equal layers holds the same part 32 times. Parts do not depend
on each other's softmaxes, so each can be judged alone; and a part that is the same as another, up to the names of its nodes,
gets the same verdict without being traced.

Two parts are the same if their nodes, in graph order, have the same targets, constants, modes and source lines, values of the
same shapes, strides, dtypes, devices, gradients and aliases, if arguments are nodes of the same rank, and if buffers among
their inputs hold the same values. What the analysis reads of a part is nothing else; what depends on the graph around it
(later writes, hooks) is judged for every repetition (`legality`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from . import dynamo_graph as dg
from .buffers import Buffers


@dataclass(frozen=True, eq=False)
class Part:
    """What lies around some softmaxes, cut at linear layers, convolutions and norms.

    Attributes:
        nodes: The calls to trace, in graph order, without switches of modes.
        own: Those that depend on the softmaxes. They are in no other part.
    """

    nodes: tuple[Node, ...]
    own: frozenset[Node]


@dataclass(frozen=True, eq=False)
class Repeated:
    """A part and its repetitions.

    Attributes:
        part: The first of them.
        description: What they are, without names; parts of other graphs with it are equal too if they hold the same buffers.
        ranked: For the first and each repetition: its nodes and inputs. Those of one rank stand for each other.
    """

    part: Part
    description: object
    ranked: tuple[Sequence[Node], ...]

    @property
    def copies(self) -> list[dict[Node, Node]]:
        """For each repetition: what stands in it for each node and input of the first."""
        first, *others = self.ranked
        return [dict(zip(first, ranked)) for ranked in others]


def attention_parts(gm: GraphModule) -> list[Part]:
    """The parts of a graph, in the order of their first own nodes; empty if nothing looks like attention."""
    # A transform's body is computed on tensors that are not what they look like, by ops that must not be replaced there.
    transformed = dg.transformed(gm.graph)
    cuts = {n for n in gm.graph.nodes if n in transformed or _cuts(n)}
    below = _below_softmaxes(gm, cuts)
    if not below:
        return []
    written = dg.writers(n for n in gm.graph.nodes if n not in cuts)
    owns = [set(own) for own in _connected(below)]
    wanted = [_wanted(own, cuts, written) for own in owns]
    if sum(map(len, wanted)) > MOST_OVERLAP * len(set().union(*wanted)) or _entangled(owns, wanted):
        owns, wanted = [set().union(*owns)], [set().union(*wanted)]
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    calls = [(n for n in w if dg.is_call(n) and n not in cuts and not dg.switches_mode(n)) for w in wanted]
    parts = [Part(tuple(sorted(nodes, key=order.__getitem__)), frozenset(own)) for nodes, own in zip(calls, owns)]
    return [_nearby(part, written) for part in parts]


NODES, NODES_EACH = 1500, 500
"""What a part may have, and what each softmax in it adds: tracing thousands of nodes of other arithmetic would take minutes."""


def _nearby(part: Part, written: dict[int, list[Node]]) -> Part:
    """The nodes of a part that are nearest to its softmaxes, if there are too many; results of the others become inputs."""
    nodes = set(part.nodes)
    near = {n for n in part.nodes if dg.target_name(n) in dg.SOFTMAX_TARGETS}
    most = NODES + NODES_EACH * len(near)
    # The values of a tensor that is written are told apart by tracing all writes.
    if len(nodes) <= most or any(dg.storage(n) in written for n in part.nodes):
        return part
    order = {n: k for k, n in enumerate(part.nodes)}
    ring = list(near)
    while ring and len(near) < most:
        around = {a for n in ring for a in (*dg.inputs(n), *n.users) if a in nodes and a not in near}
        ring = sorted(around, key=order.__getitem__)[: most - len(near)] if len(near) + len(around) > most else list(around)
        near.update(ring)
    return Part(tuple(n for n in part.nodes if n in near), part.own & near)


MOST_OVERLAP = 3
"""Parts that share more than this (writes into one tensor by all layers, say) are one part."""


def _entangled(owns: Sequence[set[Node]], wanted: Sequence[set[Node]]) -> bool:
    """Whether a part depends on the softmaxes of another, through a tensor that both write into."""
    part_of = {n: k for k, own in enumerate(owns) for n in own}
    return any(part_of.get(n, k) != k for k, w in enumerate(wanted) for n in w)


def _cuts(n: Node) -> bool:
    if n.op in ("placeholder", "get_attr", "output"):
        return True
    if dg.is_higher_order(n):
        return not dg.is_flex(n)
    return dg.is_cut(n)


def _below_softmaxes(gm: GraphModule, cuts: set[Node]) -> list[Node]:
    """The softmaxes and what depends on them without a cut in between, in graph order."""
    below: set[Node] = set()
    for n in gm.graph.nodes:
        if n not in cuts and (dg.target_name(n) in dg.SOFTMAX_TARGETS or any(a in below for a in n.all_input_nodes)):
            below.add(n)
    return [n for n in gm.graph.nodes if n in below]


def _connected(nodes: Iterable[Node]) -> list[list[Node]]:
    """The connected components of some nodes under "is an argument of"."""
    nodes = list(nodes)
    leader = {n: n for n in nodes}

    def find(n: Node) -> Node:
        while leader[n] is not n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    for n in nodes:
        for a in n.all_input_nodes:
            if a in leader:
                leader[find(n)] = find(a)
    components: dict[Node, list[Node]] = {}
    for n in nodes:
        components.setdefault(find(n), []).append(n)
    return list(components.values())


def _wanted(own: Iterable[Node], cuts: set[Node], written: dict[int, list[Node]]) -> set[Node]:
    """The nodes and what they depend on. A write into something wanted is wanted, with what it writes."""
    wanted = dg.ancestors(own, cuts)
    while True:
        more = {w for n in wanted for w in written.get(dg.storage(n) or -1, ())} - wanted
        if not more:
            return wanted
        wanted |= dg.ancestors(more, cuts)


def repeated(gm: GraphModule, parts: Iterable[Part], modes: Mapping[Node, dg.Modes], buffers: Buffers) -> list[Repeated]:
    """The parts grouped by what they are.

    Args:
        gm: Their graph.
        parts: From `attention_parts`.
        modes: The modes in force at the nodes of the graph.
        buffers: Which inputs have a value that may be read.
    """
    alike: dict[object, list[tuple[Part, list[Node]]]] = {}
    for part in parts:
        lines, ranked = _description(part, modes)
        alike.setdefault(lines, []).append((part, ranked))
    out = []
    for lines, group in alike.items():
        same: dict[object, list[tuple[Part, list[Node]]]] = {}
        for part, ranked in group:
            same.setdefault(held_buffers(ranked, buffers) if len(group) > 1 else (), []).append((part, ranked))
        for members in same.values():
            out.append(Repeated(members[0][0], lines, tuple(ranked for _, ranked in members)))
    return out


def held_buffers(ranked: Sequence[Node], buffers: Buffers) -> tuple[int | None, ...]:
    """The values of the buffers among some nodes, by rank: what is a buffer here and an argument there is not the same."""
    held = [buffers.of(n) for n in ranked]
    return tuple(None if b is None else id(b.content) for b in held)


def _description(part: Part, modes: Mapping[Node, dg.Modes]) -> tuple[tuple[object, ...], list[Node]]:
    """What a part is, hashable and without names; and its nodes and inputs by rank."""
    described = _Description()
    for n in part.nodes:
        described.add(n, modes[n], dg.source_of(n), n in part.own)
    return tuple(described.lines), list(described.rank)


class _Description:
    """Nodes and inputs without names, in the order in which they are met."""

    def __init__(self) -> None:
        self.rank: dict[Node, int] = {}
        self.lines: list[object] = []
        self._storages: dict[int, int] = {}

    def add(self, n: Node, *more: object) -> None:
        """A call, with what else is to be compared of it."""
        self.lines.append((n.op, n.target, self._argument(n.args), self._argument(n.kwargs), *more))
        self._enter(n)

    def _enter(self, n: Node) -> int:
        self.rank[n] = len(self.rank)
        s = dg.storage(n)
        alias = self._storages.setdefault(s, len(self._storages)) if s is not None else None
        self.lines.append((alias, _described(dg.value(n), n)))
        return self.rank[n]

    def _argument(self, a: object) -> object:
        if isinstance(a, Node):
            if a in self.rank:
                return "%", self.rank[a]
            return "input", self._enter(a), _attribute(a) if a.op == "get_attr" else None
        if isinstance(a, (list, tuple)):
            return type(a).__name__, *map(self._argument, a)
        if isinstance(a, Mapping):
            return "dict", *((k, self._argument(y)) for k, y in a.items())
        if isinstance(a, slice):
            return "slice", self._argument(a.start), self._argument(a.stop), self._argument(a.step)
        return (type(a).__name__, repr(a)) if not isinstance(a, torch.Tensor) else id(a)


def _attribute(n: Node) -> object:
    """What a ``get_attr`` node stands for: the functions of a `flex_attention` by what they compute, all else by identity."""
    held: object = n.graph.owning_module
    for name in str(n.target).split("."):
        held = getattr(held, name)
    return _function(held) if isinstance(held, GraphModule) else id(held)


def _function(body: GraphModule) -> tuple[object, ...]:
    """A graph without names."""
    described = _Description()
    for n in body.graph.nodes:
        if n.op in ("placeholder", "get_attr"):
            described._argument(n)
        else:
            described.add(n)
    return tuple(described.lines)


def _described(value: object, n: Node) -> object:
    """A recorded value without its identity."""
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided
        numbers = (*value.shape, *value.stride(), value.storage_offset()) if plain else value.shape
        return type(value).__name__, value.dtype, str(value.device), value.requires_grad, tuple(map(str, numbers))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool, str)):
        return type(value).__name__, str(value)
    if isinstance(value, (list, tuple)):
        return tuple(_described(y, n) for y in value)
    return type(value).__name__ if value is None else n  # of other things nothing is known


def to_trace(gm: GraphModule, parts: Iterable[Part]) -> tuple[list[Node], list[Node]]:
    """``(calls, inputs)``, both in graph order: the nodes of some parts with all switches of modes, and what they depend on."""
    held = {n for part in parts for n in part.nodes}
    needed = {a for n in held for a in dg.inputs(n)} - held
    transformed = dg.transformed(gm.graph)
    calls = [n for n in gm.graph.nodes if n in held or dg.switches_mode(n) and n not in transformed]
    return calls, [n for n in gm.graph.nodes if n in needed]
