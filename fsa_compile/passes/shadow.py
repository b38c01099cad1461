"""The shadow graph: a functional, high-level ATen graph of the attention parts, to be read and never compiled.

The Dynamo graph is run again under ``FunctionalTensorMode(pre_dispatch=True, export=True)`` and ``make_fx`` on its own
fake values, every intermediate returned. What comes out keeps ``softmax``, ``matmul``, ``einsum`` and ``topk`` whole and
has no in-place writes left. A map leads from Dynamo nodes to shadow nodes.

Tracing costs about 1.5 ms a node, more than lifting and proving together. So only what lies around attention is traced, and
of equal layers only the first (`parts`).

Note [The examples' fake mode]: the trace must run in the fake mode of the placeholders' ``example_value``, outside of any
tracing context; the context's own fake mode is another one, and mixing them fails.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
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
from .flex_call import FlexCall, flex_call

FLEX = "fsa_shadow::flex_attention"
"""What stands for a call of `flex_attention` in a shadow graph: one node with operands and captured tensors."""
_library = torch.library.Library("fsa_shadow", "DEF")
_library.define("flex_attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, int call) -> Tensor")


@torch.library.register_fake(FLEX, lib=_library)
def _flex_output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: list[torch.Tensor], call: int) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@dataclass(frozen=True)
class FlexBodies:
    """The functions of a `flex_attention` node of a shadow graph, as shadow graphs of their own.

    Attributes:
        call: The call in the Dynamo graph.
        score, mask: Functional graphs: scalars (score, batch, head, query, key; without score) and captured values.
        score_captured, mask_captured: For each captured value: its position in the node's list, or None for a number.
    """

    call: FlexCall
    score: GraphModule
    mask: GraphModule
    score_captured: tuple[int | None, ...]
    mask_captured: tuple[int | None, ...]


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


class _Recorder(fx.Interpreter):
    """Runs a slice of the Dynamo graph and remembers every tensor it makes."""

    def __init__(self, gm: GraphModule, inside: Sequence[Node], inputs: Sequence[Node], numbers: Mapping[Node, float]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.inside, self.inputs, self.numbers = inside, inputs, numbers
        self.made: list[tuple[Node, torch.Tensor]] = []
        self.flex: list[FlexCall] = []

    def run_node(self, n: Node) -> Any:
        if n in self.numbers:
            return self.numbers[n]
        call = flex_call(n)
        if call is not None:
            return self._flex(call)
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

    def _flex(self, call: FlexCall) -> tuple[torch.Tensor, ...]:
        """The output; log-sum-exp and maxima are tensors that nothing is known of."""
        recorded = dg.value(call.node)[0].dtype  # type: ignore[index]
        q, k, v = (self.env[n].to(recorded) if self.env[n].dtype != recorded else self.env[n] for n in (call.q, call.k, call.v))
        captured = [self.env[n] for n in call.inputs[3:] if isinstance(dg.value(n), torch.Tensor)]
        out = torch.ops.fsa_shadow.flex_attention(q, k, v, captured, len(self.flex))
        self.flex.append(call)
        return out, *(q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))

    def trace(self, *args: Any) -> tuple[torch.Tensor, ...]:
        self.flex = []
        self.env = {**dict(zip(self.inputs, args)), **{n: v for n, v in self.numbers.items() if n in self.inputs}}
        self.made = [(n, a) for n, a in self.env.items() if isinstance(a, torch.Tensor)]
        for n in self.inside:
            r = self.env[n] = self.run_node(n)
            if isinstance(r, torch.Tensor):
                self.made.append((n, r))
        return tuple(t for _, t in self.made)


def _backed_float(n: Node) -> torch.SymFloat | None:
    """A Python float of the model that ``dynamic=True`` made an input. Taking its value guards it: another value compiles again."""
    value = dg.value(n)
    return value if dg.target_name(n) == "item" and isinstance(value, torch.SymFloat) and value.node.has_hint() else None


def _one_length(n: Node) -> None:
    """Guards that keys and values of an SDPA have one length where both are dynamic. Eager raises if they have not, and the fake
    function does not look: the guard holds wherever the model runs."""
    k, v = (dg.value(n.args[place] if len(n.args) > place else n.kwargs[name]) for place, name in ((1, "key"), (2, "value")))
    if isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor):
        bool(k.shape[-2] == v.shape[-2])


def trace(gm: GraphModule, inside: Sequence[Node], inputs: Sequence[Node]) -> Shadow | None:
    """The shadow of a part of a Dynamo graph; None if no tensor goes into it.

    Args:
        gm: The graph, whose nodes carry ``meta["example_value"]``. It is not changed.
        inside: The calls to trace, in graph order, with all switches of modes.
        inputs: What they depend on.
    """
    given = [_input_value(gm, n) for n in inputs]
    fake = next((t for t in tree_leaves(given) if isinstance(t, FakeTensor)), None)
    if fake is None:
        return None
    for n in inside:  # not while tracing, where a comparison of sizes would be a node
        if dg.target_name(n) == "scaled_dot_product_attention":
            _one_length(n)
    floats = ((n, _backed_float(n)) for n in (*inside, *inputs))
    recorder = _Recorder(gm, inside, inputs, {n: float(s) for n, s in floats if s is not None})
    grad = torch.is_grad_enabled()
    with warnings.catch_warnings(), torch._guards.tracing(None), fake.fake_mode, enable_python_dispatcher():
        warnings.simplefilter("ignore")
        functional = dispatch_functionalize(recorder.trace, FunctionalTensorMode(pre_dispatch=True, export=True))
        try:
            shadow = make_fx(functional, pre_dispatch=True, tracing_mode="real")(*given)
        finally:
            torch.set_grad_enabled(grad)
        for n in shadow.graph.nodes:
            if n.target is torch.ops.fsa_shadow.flex_attention.default:
                n.meta["flex"] = _flex_bodies(recorder.flex[n.args[4]], n.name)
    output = next(n for n in shadow.graph.nodes if n.op == "output")
    results = output.args[0]
    output.args = ((),)  # so that the users of a node are those of the model
    of = {n: s for (n, _), s in zip(recorder.made, results) if isinstance(s, Node)}
    standing: dict[Node, list[Node]] = {}
    for n, s in of.items():
        standing.setdefault(s, []).append(n)
    return Shadow(shadow, of, {s: tuple(ns) for s, ns in standing.items()})


def dynamo_node(shadow: Shadow, n: Node) -> Node | None:
    """The Dynamo node that made a shadow node, or the nearest one after it."""
    seen, todo = {n}, [n]
    while todo:
        s = todo.pop(0)
        if s in shadow.standing_for:
            return shadow.standing_for[s][0]
        for u in s.users:
            if u not in seen:
                seen.add(u)
                todo.append(u)
    return None


class _Body(fx.Interpreter):
    """Runs a score or mask function, in which tensors are indexed by scalars."""

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n.target is operator.getitem and isinstance(dg.value(n.args[0]), torch.Tensor):
            source, index = self.fetch_args_kwargs_from_env(n)[0]
            index = index if isinstance(index, (tuple, list)) else (index,)
            if all(isinstance(i, (torch.Tensor, int)) and not isinstance(i, bool) for i in index):
                given = [i if isinstance(i, torch.Tensor) else torch.full((), i) for i in index]
                return torch.ops.aten.index(source, given)
        return super().run_node(n)


def _flex_bodies(call: FlexCall, name: str) -> FlexBodies:
    """The functions of a call, traced on scalars as eager gives them: positions in int64, scores in float32 at least."""
    recorded = dg.value(call.q)
    assert isinstance(recorded, torch.Tensor)
    score = torch.empty((), dtype=torch.promote_types(recorded.dtype, torch.float32), device=recorded.device)
    where = [torch.empty((), dtype=torch.int64, device=recorded.device) for _ in range(4)]
    graphs, positions, k = [], [], 0
    for body, scalars, captured in (
        (call.score, (score, *where), call.score_captured), (call.mask, where, call.mask_captured),
    ):  # fmt: skip
        values = [dg.value(c) if isinstance(c, Node) else c for c in captured]
        graphs.append(_functional(body, (*scalars, *values), f"{name}_{'mask' if graphs else 'score'}"))
        places: list[int | None] = []
        for v in values:
            places.append(k if isinstance(v, torch.Tensor) else None)
            k += isinstance(v, torch.Tensor)
        positions.append(tuple(places))
    return FlexBodies(call, *graphs, *positions)


def _functional(body: GraphModule, args: Sequence[Any], prefix: str) -> GraphModule:
    """The functional ATen graph of a body, in names that no other graph has; the result is the output node's argument."""
    run = dispatch_functionalize(_Body(body).run, FunctionalTensorMode(pre_dispatch=True, export=True))
    traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*args)
    for n in traced.graph.nodes:
        n.name = f"{prefix}.{n.name}"
    return traced


def _input_value(gm: GraphModule, n: Node) -> Any:
    """What stands for an input of the slice: its recorded fake value, or the attribute it names."""
    v = dg.value(n)
    if v is None and n.op == "get_attr":
        v = gm
        for part in str(n.target).split("."):
            v = getattr(v, part)
    return v
