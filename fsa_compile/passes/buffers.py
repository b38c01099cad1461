"""Masks that a model keeps: inputs of a graph whose value can be read when it is compiled.

Dynamo lifts buffers, tensor attributes of modules, globals and closed-over tensors to inputs of the graph, and hands the
tensors themselves to the backend. Their value is read (`closed_form.fit`) if a proof asks for it. Nothing keeps a program
from changing it later, so every buffer that a rewrite relies on is checked at each call (`fsa_compile/checked.py`), and the
graph as the user wrote it is kept for the day on which the check fails.

An argument of the compiled function is no buffer: another one comes with each call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..checked import in_words
from . import dynamo_graph as dg
from .closed_form import ClosedForm, fit
from .shadow import Shadow


class Content:
    """A value that one or more buffers hold.

    Args:
        t: A tensor that holds it. It is copied: what is concluded from the value holds for the copy, whatever becomes of `t`.
    """

    def __init__(self, t: torch.Tensor) -> None:
        self.value = t.detach().clone()

    @functools.cached_property
    def form(self) -> ClosedForm | None:
        """The value as an expression, if it has one that is known."""
        return fit(self.value)


@dataclass(frozen=True, eq=False)
class Buffer:
    """An input of the root graph that is a buffer.

    Attributes:
        position: Which argument of the compiled graph it is.
        label: What the user calls it: ``"self.mask"``.
        tensor: The tensor, shared with the model.
        contents: The values of all buffers of the graph that were read so far.
    """

    position: int
    label: str
    tensor: torch.Tensor
    contents: list[Content]

    @functools.cached_property
    def content(self) -> Content:
        """Its value: each is read and kept once, however many layers hold it."""
        t = self.tensor
        for c in self.contents:
            u = c.value
            if (u.shape, u.dtype, u.device) == (t.shape, t.dtype, t.device) and torch.equal(*in_words(u, t)):
                return c
        self.contents.append(Content(t))
        return self.contents[-1]


class Buffers:
    """The buffers of one compilation.

    Args:
        gm: The root graph.
        example_inputs: What Dynamo passed for its placeholders.

    Attributes:
        relied: The buffers that rewrites rely on.
        original: The graph as it was before the first rewrite that relies on one.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        self.relied: dict[int, Buffer] = {}
        self.original: GraphModule | None = None
        self._gm = gm
        self._of: dict[Node, Buffer] = {}
        graphs = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
        written = {s for graph in graphs for s in dg.written_storages(graph.nodes)}
        contents: list[Content] = []
        for position, (n, t) in enumerate(zip(_placeholders(gm), example_inputs)):
            if _kept_by_the_model(n) and _has_a_value(n, t) and dg.storage(n) not in written:
                self._of[n] = Buffer(position, dg.label_of(n), t, contents)
        self._enter_bodies(gm)

    def read_by(self, shadow: Shadow) -> Mapping[str, Buffer]:
        """The buffers among the inputs of a shadow graph, by the names of their nodes there."""
        found = {}
        for s, nodes in shadow.standing_for.items():
            inputs = [n for n in nodes if n.op == "placeholder"]  # several if one was made to share the storage of another
            if s.op == "placeholder" and len(inputs) == 1 and inputs[0] in self._of:
                found[s.name] = self._of[inputs[0]]
        return found

    def of(self, n: Node) -> Buffer | None:
        """The buffer that a placeholder stands for, if it is one."""
        return self._of.get(n)

    def rely_on(self, buffers: Iterable[Buffer]) -> None:
        """To be called before a graph changes in a way that is right only for the values of these buffers."""
        self.relied.update((b.position, b) for b in buffers)
        if self.relied and self.original is None:
            self.original = _copy(self._gm)

    def _enter_bodies(self, gm: GraphModule) -> None:
        """What is passed to the body of a checkpoint is known in there, if all calls of the body pass the same."""
        passed: dict[Node, set[Buffer | None]] = {}
        for call, k in dg.body_calls(gm):
            body = getattr(gm, str(call.args[k].target))  # type: ignore[union-attr]
            for inner, outer in zip(_placeholders(body), call.args[k + 1 :]):
                passed.setdefault(inner, set()).add(self._of.get(outer) if isinstance(outer, Node) else None)
        for inner, outers in passed.items():
            (buffer, *others) = outers
            if buffer is not None and not others:
                self._of[inner] = buffer
        for _, body in dg.bodies(gm):
            self._enter_bodies(body)


def _placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _kept_by_the_model(n: Node) -> bool:
    """Whether a placeholder is an attribute of a module, a global or a closed-over variable, and no argument."""
    if "_dynamo_static_input_type" in (n.meta.get("tensor_dict") or {}):
        return True
    source = getattr(n.meta.get("grapharg"), "source", None)
    while getattr(source, "base", None) is not None:
        source = source.base
    return type(source).__name__ == "GlobalSource" or bool(getattr(source, "is_derefed_cell_contents", False))


_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.bfloat16, torch.float16, torch.float32, torch.float64,
)  # fmt: skip


def _has_a_value(n: Node, t: Any) -> bool:
    """Whether an input is a plain tensor with a value, without a gradient."""
    plain = type(t) is torch.Tensor and t.layout is torch.strided and t.device.type != "meta" and t.dtype in _DTYPES
    return plain and not t.requires_grad and isinstance(dg.value(n), torch.Tensor)


def _copy(gm: GraphModule) -> GraphModule:
    """A graph and the graphs of its bodies, sharing nothing that a rewrite changes."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    for n in graph.nodes:
        n.meta.clear()  # fake tensors do not outlive the compilation
        body = getattr(gm, str(n.target), None) if n.op == "get_attr" else None
        if isinstance(body, GraphModule):
            setattr(copied, str(n.target), _copy(body))
    return copied
