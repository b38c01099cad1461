"""The shadow graph: a functional, high-level ATen graph of the attention parts, to be read and never compiled.

The Dynamo graph is run again under ``FunctionalTensorMode(pre_dispatch=True, export=True)`` and ``make_fx`` on its own
fake values, every intermediate returned. What comes out keeps ``softmax``, ``matmul``, ``einsum`` and ``topk`` whole and
has no in-place writes left. A map leads from Dynamo nodes to shadow nodes.

Tracing costs about 1.5 ms a node, more than lifting and proving together. So only the part around attention is traced:
what is below the softmaxes, and what they feed, both cut at linear layers, convolutions and norms.

Note [The examples' fake mode]: the trace must run in the fake mode of the placeholders' ``example_value``, outside of any
tracing context; the context's own fake mode is another one, and mixing them fails.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from . import dynamo_graph as dg


@dataclass(frozen=True)
class Shadow:
    """A shadow graph and what its nodes stand for.

    Attributes:
        graph_module: The functional graph.
        of: From a Dynamo node to the shadow node with its final value.
        standing_for: From a shadow node to the Dynamo nodes that hold its value, in graph order.
    """

    graph_module: GraphModule
    of: dict[Node, Node]
    standing_for: dict[Node, tuple[Node, ...]]


def attention_slice(gm: GraphModule) -> tuple[list[Node], list[Node]]:
    """The nodes to trace, in order, and their inputs.

    Returns:
        ``(inside, inputs)``; both empty if the graph holds nothing that looks like attention.
    """
    seeds = [n for n in gm.graph.nodes if dg.target_name(n) in dg.SOFTMAX_TARGETS]
    if not seeds:
        return [], []
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    cuts = {n for n in gm.graph.nodes if _cuts(n)}
    forward: set[Node] = set()
    todo = list(seeds)
    while todo:
        n = todo.pop()
        if n in forward or n in cuts or n.op == "output":
            continue
        forward.add(n)
        todo.extend(n.users)
    written: dict[int, list[Node]] = {}
    for n in gm.graph.nodes:
        for a in dg.written_by(n) if n not in cuts else ():
            s = dg.storage(a)
            if s is not None:
                written.setdefault(s, []).append(n)
    wanted = dg.ancestors(forward, cuts)
    while True:  # a write into something wanted is wanted, with what it writes
        more = {w for n in wanted for w in written.get(dg.storage(n) or -1, ())} - wanted
        if not more:
            break
        wanted |= dg.ancestors(more, cuts)
    inside = [n for n in gm.graph.nodes if (n in wanted and n not in cuts and dg.is_call(n)) or dg.switches_mode(n)]
    needed = {a for n in inside for a in n.all_input_nodes} - set(inside)
    return inside, sorted(needed, key=order.__getitem__)


def _cuts(n: Node) -> bool:
    if n.op in ("placeholder", "get_attr", "output"):
        return True
    return dg.is_higher_order(n) or (dg.target_name(n) in dg.CUT_TARGETS and isinstance(dg.value(n), torch.Tensor))


class _Recorder(fx.Interpreter):
    """Runs a slice of the Dynamo graph and remembers every tensor it makes."""

    def __init__(self, gm: GraphModule, inside: list[Node], inputs: list[Node]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.inside, self.inputs = inside, inputs
        self.made: list[tuple[Node, torch.Tensor]] = []

    def run_node(self, n: Node) -> Any:
        if dg.target_name(n) in dg.CONTRACTIONS and isinstance(dg.value(n), torch.Tensor):
            return self._contract(n, dg.value(n).dtype)  # type: ignore[union-attr]
        return super().run_node(n)

    def _contract(self, n: Node, recorded: torch.dtype) -> Any:
        """A contraction with the casts that autocast makes: below the pre-dispatch mode it makes none."""

        def cast(a: Any) -> Any:
            real = isinstance(a, torch.Tensor) and a.is_floating_point() and recorded.is_floating_point
            return a.to(recorded) if real and a.dtype != recorded else a

        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = tree_map(cast, (args, kwargs))
        return getattr(self, n.op)(n.target, args, kwargs)

    def trace(self, *args: Any) -> tuple[torch.Tensor, ...]:
        self.env = dict(zip(self.inputs, args))
        self.made = [(n, a) for n, a in self.env.items() if isinstance(a, torch.Tensor)]
        for n in self.inside:
            r = self.env[n] = self.run_node(n)
            if isinstance(r, torch.Tensor):
                self.made.append((n, r))
        return tuple(t for _, t in self.made)


def trace(gm: GraphModule) -> Shadow | None:
    """The shadow of the attention parts of a Dynamo graph; None if it has none.

    Args:
        gm: The graph, whose nodes carry ``meta["example_value"]``. It is not changed.
    """
    inside, inputs = attention_slice(gm)
    if not inside:
        return None
    given = [_input_value(gm, n) for n in inputs]
    fake = next((t for t in tree_leaves(given) if isinstance(t, FakeTensor)), None)
    if fake is None:
        return None
    recorder = _Recorder(gm, inside, inputs)
    grad = torch.is_grad_enabled()
    with warnings.catch_warnings(), torch._guards.tracing(None), fake.fake_mode, enable_python_dispatcher():
        warnings.simplefilter("ignore")
        functional = dispatch_functionalize(recorder.trace, FunctionalTensorMode(pre_dispatch=True, export=True))
        try:
            shadow = make_fx(functional, pre_dispatch=True, tracing_mode="real")(*given)
        finally:
            torch.set_grad_enabled(grad)
    output = next(n for n in shadow.graph.nodes if n.op == "output")
    results = output.args[0]
    output.args = ((),)  # so that the users of a node are those of the model
    of = {n: s for (n, _), s in zip(recorder.made, results) if isinstance(s, Node)}
    standing: dict[Node, list[Node]] = {}
    for n, s in of.items():
        standing.setdefault(s, []).append(n)
    return Shadow(shadow, of, {s: tuple(ns) for s, ns in standing.items()})


def _input_value(gm: GraphModule, n: Node) -> Any:
    """What stands for an input of the slice: its recorded fake value, or the attribute it names."""
    v = dg.value(n)
    if v is None and n.op == "get_attr":
        v = gm
        for part in str(n.target).split("."):
            v = getattr(v, part)
    return v
