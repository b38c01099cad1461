"""Whether a proven site may be replaced where it stands in the Dynamo graph.

The proof says what the site computes. This module says that the op, put in the place of the site's last node, reads the
same values and gives the same gradients: operands exist and are not written in between, one grad mode, no hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from ..report import ReasonKind
from . import dynamo_graph as dg
from . import expr as x
from .classify import Match
from .expr import Expr
from .flex_call import flex_call, why_inconsistent
from .nodes import op_name
from .reader import Reader
from .refusal import Refusal
from .shadow import Shadow

_EVALUABLE = frozenset(
    (
        "sum var size prod div mod if_int apply predicate load softmax true false not and or ge eq exists compare const "
        "float scaled"
    ).split()
)
"""What a block list may be made of for the rewrite to compute it: see `TensorEvaluator`."""


@dataclass(frozen=True)
class ListTensor:
    """A segment of a block list as an expression over the four axes of a tensor.

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
        temperatures: What multiplies or divides q first, in the order of the form.
        blocks: The segments of the block list, if the role has one.
        data: For each shadow node that the block list reads: the Dynamo node that holds it.
        flex: The call, if the site is a `flex_attention`.
    """

    output: Node
    q: Node
    k: Node
    v: Node
    temperatures: tuple[Node, ...]
    blocks: tuple[ListTensor, ...]
    data: dict[str, Node]
    flex: Node | None

    @property
    def operands(self) -> tuple[Node, ...]:
        """The tensors that gradients flow to."""
        return self.q, self.k, self.v, *self.temperatures

    def reading(self, others: tuple[Node, ...]) -> Placement:
        """The same place, with others among its operands."""
        return replace(self, temperatures=(*self.temperatures, *others))

    def in_copy(self, counterpart: Mapping[Node, Node]) -> Placement:
        """The same place in a repetition of the part of the graph (`parts.Repeated.copies`)."""
        output, q, k, v, *temperatures = (counterpart[n] for n in (self.output, *self.operands))
        data = {name: counterpart[n] for name, n in self.data.items()}
        flex = None if self.flex is None else counterpart[self.flex]
        return Placement(output, q, k, v, tuple(temperatures), self.blocks, data, flex)


def place(r: Reader, shadow: Shadow, match: Match) -> Placement:
    """The Dynamo nodes of a match. `Surroundings.allow` says whether it is legal to replace them.

    Raises:
        Refusal: If there are none.
    """
    form = match.form

    def first(name: str) -> Node:
        return shadow.standing_for[r.nodes[name]][0]

    output = first(form.output)
    bodies = r.nodes[form.softmax].meta.get("flex")
    q, k, v, *temperatures = (first(o.node) for o in (form.q, form.k, form.v, *form.temperatures))
    blocks = tuple(_list_tensors(r, shadow, match))
    data = {name: _holder(r, shadow, name) for name in sorted(_data_names(r, blocks))}
    return Placement(output, q, k, v, tuple(temperatures), blocks, data, bodies.call.node if bodies is not None else None)


def _one_mask(flex: Node) -> None:
    """The op computes what the mask function of a `flex_attention` says; the tables of its block mask must say the same."""
    call = flex_call(flex)
    assert call is not None
    why = why_inconsistent(call)
    if why is not None:
        raise Refusal(ReasonKind.MASK, why)
    for u in flex.users:
        if u.args[1] != 0 and u.users:
            raise Refusal(ReasonKind.OPERANDS, "flex_attention returns log-sum-exps or maxima too, which the op does not give back")


def needs_grad(shadow: Shadow, n: Node) -> bool:
    """Whether gradients flow through a shadow node."""
    values = [dg.value(d) for d in shadow.standing_for.get(n, ())]
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in values) if values else True


def _list_tensors(r: Reader, shadow: Shadow, match: Match) -> Iterator[ListTensor]:
    """The block list over tensor axes, in terms of the user's own integer and truth tensors where they hold it."""
    blocks, form = match.candidate.blocks, match.form
    if blocks is None:
        return
    heads = form.groups * form.kv_heads if blocks.per_query_head else form.kv_heads
    head = x.var("list_head", heads) if heads > 1 else x.ZERO
    h = x.as_var(form.h)
    mapping = {h: head if blocks.per_query_head else x.times(head, form.groups)} if h is not None else {}
    held = _Held(r, shadow, {**blocks.index, **mapping})
    for segment in blocks.segments:
        valid, entry = (held.rewrite(e) for e in (segment.valid, segment.entry))
        slot = x.as_var(segment.slot)
        axes = [
            x.as_var(e) or x.as_var(x.var(f"unit{k}", 2)) for k, e in enumerate((form.b, head, form.i, segment.slot))
        ]
        sizes = (form.sizes[0], x.integer(heads), form.sizes[2], slot.args[1] if slot is not None else x.ONE)
        yield ListTensor(tuple(axes), sizes, x.select(valid, entry, x.integer(-1)))  # type: ignore[arg-type]


class _Held:
    """Integer and truth expressions in terms of the tensors of the model's own graph that hold them.

    This keeps the user's own list instead of computing it again, and finds it where its ingredients are gone because they
    were overwritten in place.

    Args:
        r: The reader, which remembers what each node was read as.
        shadow: Which nodes the model's own graph has.
        mapping: Substituted in everything: key index to slot, query head to list head.
    """

    def __init__(self, r: Reader, shadow: Shadow, mapping: dict[Expr, Expr]) -> None:
        self.mapping = mapping
        self.sums = {moved: x.load(n.name, at) for moved, n, at in (self._anywhere(*item) for item in r.sums.items())}
        self.holders: dict[Expr, tuple[Node, tuple[Expr, ...]]] = {}
        best: dict[Expr, int] = {}
        for e, everywhere in r.origins.items():
            places = [(n, coords) for n, coords in everywhere if n in shadow.standing_for]
            if not places or not any(t.op in ("apply", "predicate", "compare") for t in x.walk(e)):
                continue
            moved = x.substitute(e, mapping)
            for n, coords in places:
                at = tuple(x.substitute(c, mapping) for c in coords)
                if not set().union(*(c.free for c in at)) <= moved.free:
                    continue
                gathers = sum(x.as_var(c) is None and c is not x.ZERO for c in at)
                if moved not in best or gathers < best[moved]:
                    best[moved], self.holders[moved] = gathers, (n, at)

    def _anywhere(self, e: Expr, place: tuple[Node, tuple[Expr, ...]]) -> tuple[Expr, Node, tuple[Expr, ...]]:
        """A sum and a place that holds it; of several that do, as where a matrix repeats its columns, the first."""
        n, coords = place
        moved, at = x.substitute(e, self.mapping), [x.substitute(c, self.mapping) for c in coords]
        elsewhere = dict.fromkeys(frozenset().union(*(c.free for c in at)) - moved.free, x.ZERO)
        return moved, n, tuple(x.substitute(c, elsewhere) for c in at)

    def rewrite(self, e: Expr) -> Expr:
        """`e` after the mapping, with its largest parts that a node holds replaced by an element of that node."""
        memo: dict[Expr, Expr] = {}

        def go(t: object) -> object:
            if isinstance(t, tuple):
                return tuple(go(y) for y in t)
            if isinstance(t, Expr) and t in self.sums:
                return self.sums[t]
            if not isinstance(t, Expr) or t.sort == x.REAL or not t.free or t.op == "var":
                return t
            if t not in memo:
                key = t if t.op == "sum" or t.sort == x.BOOL else x.poly(t)
                if key in self.holders:
                    n, at = self.holders[key]
                    memo[t] = x.predicate(n.name, at) if t.sort == x.BOOL else x.apply(n.name, at, t.lo, t.hi)
                else:
                    memo[t] = x.rebuild(t, go)
            return memo[t]

        out = go(x.substitute(e, self.mapping))
        assert isinstance(out, Expr)
        return out


MOST_ENTRIES = 4096
"""With so many entries a block may be compared where the model's own graph holds no tensor of the results."""


def _data_names(r: Reader, blocks: Iterable[ListTensor]) -> set[str]:
    """The shadow nodes that the block list reads."""
    names: set[str] = set()
    for t in (t for segment in blocks for t in x.walk(segment.entry)):
        if t.op not in _EVALUABLE:
            raise Refusal(ReasonKind.MASK, f"the block list holds {t.op}, which the rewrite cannot compute")
        if t.op == "exists" and not (r.sizes.known(t.args[0].args[1]) and r.sizes.hint(t.args[0].args[1]) <= MOST_ENTRIES):
            raise Refusal(ReasonKind.MASK, "each block would have to be compared with the entries of all queries")
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


class Surroundings:
    """What of the graph around the sites decides whether they may be replaced.

    Args:
        graph: The Dynamo graph, before any rewrite.
        modes: The modes in force at its nodes.
    """

    def __init__(self, graph: Graph, modes: Mapping[Node, dg.Modes]) -> None:
        self.order = {n: p for p, n in enumerate(graph.nodes)}
        self.written = dg.written_storages(graph.nodes)
        opaque = dg.transformed(graph)
        self.unseen = dg.written_storages(n for n in graph.nodes if n in opaque or dg.is_higher_order(n) and not dg.is_flex(n))
        self.modes = modes

    def allow(self, placement: Placement) -> None:
        """Whether the op may stand in `placement`.

        Raises:
            Refusal: If not.
        """
        output, operands = placement.output, placement.operands
        if placement.flex is not None:
            _one_mask(placement.flex)
        for n in (*operands, *placement.data.values()):
            if self.order[n] >= self.order[output]:
                text = f"{n.name} is computed after the attention that needs it"
                raise Refusal(ReasonKind.OPERANDS, text, source=dg.source_of(n))
        self._not_written(output, (*operands, *placement.data.values()))
        self._seen_as_written(output)
        path = _between(operands, output)
        for n in sorted(path, key=self.order.__getitem__):
            if self.modes[n].gradients != self.modes[output].gradients:
                raise Refusal(ReasonKind.GRADIENT, "the attention is computed partly without gradients", source=dg.source_of(n))
        _no_hooks(path)

    def _not_written(self, output: Node, operands: Iterable[Node]) -> None:
        """The shadow map knows final values: a write is fine before the op, and wrong after it."""
        for n in (output, *operands):
            writer = self.written.get(dg.storage(n) or -1)
            if writer is not None and (self.order[writer] > self.order[output] or n is output):
                text = f"{n.name} is written in place by {dg.target_name(writer)}"
                raise Refusal(ReasonKind.MUTATION, text, source=dg.source_of(writer))

    def _seen_as_written(self, output: Node) -> None:
        """What is written inside of calls that the shadow does not hold has one value there: nothing may read an older one."""
        for n in dg.ancestors((output,), frozenset()) if self.unseen else ():
            for a in dg.inputs(n):
                writer = self.unseen.get(dg.storage(a) or -1)
                if writer is not None and self.order[n] < self.order[writer] and dg.storage(n) != dg.storage(a):
                    text = f"{a.name} is read and then written in place by {dg.target_name(writer)}, where the analysis does not look"
                    raise Refusal(ReasonKind.MUTATION, text, source=dg.source_of(writer))


def _between(operands: tuple[Node, ...], output: Node) -> set[Node]:
    """Nodes on a way of real values from an operand to the output, the output included: where gradients flow."""
    above: set[Node] = set()
    todo = [output]
    while todo:
        n = todo.pop()
        if n not in above and n not in operands and _is_real(n):
            above.add(n)
            todo.extend(n.all_input_nodes)
    reached: set[Node] = set()
    todo = list(operands)
    while todo:
        for u in todo.pop().users:
            if u in above and u not in reached:
                reached.add(u)
                todo.append(u)
    return reached


_CREATES = frozenset("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split())
"""Calls that take nothing but shape and dtype from a tensor."""


def _is_real(n: Node) -> bool:
    v = dg.value(n)
    if dg.target_name(n) in _CREATES:
        return False
    return not isinstance(v, torch.Tensor) or v.is_floating_point()


def _no_hooks(path: set[Node]) -> None:
    for n in path:
        for u in n.users:
            if dg.target_name(u) in ("register_hook", "retain_grad", "register_post_accumulate_grad_hook"):
                raise Refusal(ReasonKind.GRADIENT, f"{n.name} has a gradient hook", source=dg.source_of(u))


