"""Reading a Dynamo graph: which nodes are attention-like, which write in place, which change a mode.

The Dynamo graph is the one that is rewritten. Its targets are what the user wrote (``torch.softmax``, ``Tensor.view``),
so this module goes by names; what things *compute* is read from the shadow graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

CUT_TARGETS = frozenset(
    "linear conv1d conv2d conv3d embedding layer_norm group_norm batch_norm rms_norm cross_entropy".split()
)
"""Calls that neither attention nor its masks look through (see `is_cut`): their results are inputs of the shadow."""

SOFTMAX_TARGETS = frozenset(
    "softmax _softmax special_softmax softmin scaled_dot_product_attention flex_attention exp exp2 special_exp2".split()
)
MODE_SWITCHES = (
    "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode",
)  # fmt: skip
WHOLE = ("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
"""Attention that Dynamo hands over as one call."""
CONTRACTIONS = frozenset("matmul bmm einsum baddbmm __matmul__ scaled_dot_product_attention mm".split())

_OPERATOR_WRITES = frozenset(
    getattr(operator, name)
    for name in (
        "setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor"
    ).split()
)


def target_name(n: Node) -> str:
    """``"softmax"`` for ``F.softmax``, ``torch.softmax`` and ``Tensor.softmax`` alike; "" for what is no call."""
    if n.op == "call_method":
        return str(n.target)
    if n.op != "call_function":
        return ""
    return getattr(n.target, "__name__", str(n.target)).split(".")[0]


def is_cut(n: Node) -> bool:
    """Whether neither attention nor its masks look through a call: its result is an input of the shadow.

    A plain embedding of rows that the graph computes is a gather of blocks, and is looked through.
    """
    if target_name(n) not in CUT_TARGETS or not isinstance(value(n), torch.Tensor):
        return False
    options = (*n.args[2:], *(v for name, v in n.kwargs.items() if name not in ("input", "weight")))
    tables = (a for a in n.all_input_nodes if isinstance(t := value(a), torch.Tensor) and t.is_floating_point())
    plain = target_name(n) == "embedding" and all(option is None or option is False for option in options)
    return not (plain and all(is_call(a) for a in tables))


def is_call(n: Node) -> bool:
    return n.op in ("call_function", "call_method", "call_module")


def value(n: Node) -> object:
    """The fake value that Dynamo recorded, or None."""
    return n.meta.get("example_value")


def is_higher_order(n: Node) -> bool:
    """Whether the call takes functions: a checkpoint, a condition, an autograd.Function."""
    return any(c.__name__ == "HigherOrderOperator" for c in type(n.target).__mro__)


def is_flex(n: Node) -> bool:
    """Whether the call is `torch.nn.attention.flex_attention.flex_attention`: the one higher-order call that is looked into."""
    return n.op == "call_function" and is_higher_order(n) and target_name(n) == "flex_attention"


def inputs(n: Node) -> list[Node]:
    """What the result of a node depends on. For `flex_attention` that is not the tables of its block mask."""
    if not is_flex(n):
        return n.all_input_nodes
    captured = [a for group in n.args[7:] for a in _nodes(group)]
    return list(dict.fromkeys([*_nodes(n.args[:3]), *captured]))


_ENTER = re.compile(r"_(vmap|grad|jvp|func)_increment_nesting|_enter_dual_level")
_LEAVE = re.compile(r"_(vmap|grad|jvp|func)_decrement_nesting|_exit_dual_level")


def transformed(graph: Graph) -> dict[Node, str]:
    """The nodes inside of functorch transforms (`vmap`, `grad`, ...), with the name of the outermost one."""
    out: dict[Node, str] = {}
    entered: list[str] = []
    for n in graph.nodes:
        name = target_name(n)
        enters = _ENTER.match(name)
        if enters:
            entered.append(enters[1] or "jvp")
        if entered:
            out[n] = entered[0]
        if entered and _LEAVE.match(name):
            entered.pop()
    return out


def writes(n: Node) -> bool:
    """Whether the call writes into one of its arguments."""
    return bool(written_by(n))


def written_by(n: Node) -> list[Node]:
    """The arguments that a call writes into."""
    if n.op not in ("call_method", "call_function"):
        return []
    out = _nodes(n.kwargs.get("out"))
    first = _nodes(n.args[:1])
    if n.op == "call_method":
        name = str(n.target)
        inplace = name == "__setitem__" or name.endswith("_") and not name.endswith("__") or _inplace_dunder(name)
        return out + first if inplace else out
    if getattr(n.target, "__module__", None) == "_operator":  # and_, or_ and not_ write nothing
        return first if n.target in _OPERATOR_WRITES else []
    if is_higher_order(n):
        return list(n.all_input_nodes) if "mutation" in str(n.target) or "auto_functionalized" in str(n.target) else []
    schema = getattr(n.target, "_schema", None)
    if schema is not None:
        marked = [(k, a.name) for k, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        return [w for k, name in marked for w in _nodes(n.args[k] if k < len(n.args) else n.kwargs.get(name))]
    name = target_name(n)
    inplace = name.endswith("_") and not name.endswith("__") or bool(n.kwargs.get("inplace"))
    return out + first if inplace else out


def _nodes(a: object) -> list[Node]:
    if isinstance(a, Node):
        return [a]
    return [n for x in a for n in _nodes(x)] if isinstance(a, (list, tuple)) else []


def _inplace_dunder(name: str) -> bool:
    return bool(re.fullmatch(r"__i(add|sub|mul|truediv|and|or|xor|matmul|floordiv|mod|pow|lshift|rshift)__", name))


def switches_mode(n: Node) -> bool:
    """Whether the call changes a global mode (grad, autocast): no tensor goes in or out."""
    if not is_call(n) or is_higher_order(n):
        return False
    module = getattr(n.target, "__module__", "") or ""
    name = target_name(n)
    return name in MODE_SWITCHES or module.startswith("torch._C._functorch")


@dataclass(frozen=True)
class Modes:
    """The modes in force at a node.

    Attributes:
        grad: What the last `_set_grad_enabled` said; before any, the mode that the graph is entered in.
        entered: The other switches that are in force, outermost first.
    """

    grad: object
    entered: tuple[object, ...]

    @property
    def gradients(self) -> tuple[object, int]:
        """What decides whether gradients are recorded: the grad mode, and how deep inference mode is."""
        return self.grad, sum(isinstance(e, tuple) and e[0] == "_enter_inference_mode" for e in self.entered)


def modes(graph: Graph, grad: object) -> dict[Node, Modes]:
    """The modes in force at each node, the switches themselves included.

    Args:
        graph: The graph.
        grad: Whether gradients are recorded when it is entered. A block under `no_grad` ends by switching to that mode again.
    """
    now = Modes(grad, ())
    out: dict[Node, Modes] = {}
    for n in graph.nodes:
        name = target_name(n)
        if name == "_set_grad_enabled":
            now = Modes(n.args[0], now.entered)
        elif switches_mode(n):
            switch = (name, repr(n.args)) if name.startswith("_enter") else n
            now = Modes(now.grad, now.entered[:-1] if name.startswith("_exit") else (*now.entered, switch))
        out[n] = now
    return out


def storage(n: Node) -> int | None:
    """An identity of the storage behind a tensor-valued node."""
    v = value(n)
    if not isinstance(v, torch.Tensor) or v.layout is not torch.strided:
        return None
    try:
        return v.untyped_storage()._cdata
    except NotImplementedError:  # inside of a vmap, where a view's first argument holds what it views
        return storage(n.args[0]) if n.args and isinstance(n.args[0], Node) else None


def writers(nodes: Iterable[Node]) -> dict[int, list[Node]]:
    """For each storage that is written in place: the nodes that write it, in their order."""
    out: dict[int, list[Node]] = {}
    for n in nodes:
        for a in written_by(n):
            s = storage(a)
            if s is not None:
                out.setdefault(s, []).append(n)
    return out


def written_storages(nodes: Iterable[Node]) -> dict[int, Node]:
    """For each storage that is written in place: the last node that writes it."""
    return {s: ns[-1] for s, ns in writers(nodes).items()}


def source_of(n: Node) -> str:
    """``"model.py:41"``: the user's innermost line behind a node, or "?"."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', n.meta.get("stack_trace") or "")
    if not frames:
        return "?"
    own = [f for f in frames if not re.search(r"/(einops|einx|torch)/", f[0])]  # layout libraries are not the user's line
    path, line = (own or frames)[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def module_of(n: Node) -> str:
    """``"layers.3.attn"``: path of the innermost ``nn.Module`` behind a node, or ""."""
    stack = n.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^L\['self'\]\.?|^L\[[^\]]*\]\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    return re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).strip(".")


def label_of(n: Node) -> str:
    """What the user calls a node: ``"self.attn.mask"`` for an input, its name for what is computed."""
    source = getattr(n.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", n.name)
    text = str(name() if callable(name) else name)
    if "___stack" in text:
        return "a value from before the graph break"
    text = re.sub(r"^[LG]\['(\w+)'\]", r"\1", text)
    text = re.sub(r"\._(?:modules|buffers|parameters)\['([^']+)'\]", r".\1", text)
    return re.sub(r"\.(\d+)", r"[\1]", text)


def bodies(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """Graph modules that stay part of the program: bodies of checkpoints. Other higher-order calls are barriers."""
    for call, k in body_calls(gm):
        attribute = str(call.args[k].target)  # type: ignore[union-attr]
        yield attribute, getattr(gm, attribute)


def body_calls(gm: GraphModule) -> Iterator[tuple[Node, int]]:
    """The calls of checkpoints, each with the position of its body among the arguments; the body's own arguments follow."""
    for n in gm.graph.nodes:
        if n.op == "call_function" and is_higher_order(n) and "checkpoint" in str(n.target):
            for k, a in enumerate(n.args):
                if isinstance(a, Node) and a.op == "get_attr" and isinstance(getattr(gm, str(a.target), None), GraphModule):
                    yield n, k


def ancestors(nodes: Iterable[Node], stop: frozenset[Node] | set[Node]) -> set[Node]:
    """`nodes` and everything they depend on, not going above `stop`."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n not in stop:
            todo.extend(inputs(n))
    return seen
