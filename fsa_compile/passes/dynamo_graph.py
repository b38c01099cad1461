"""Reading a Dynamo graph: which nodes are attention-like, which write in place, which change a mode.

The Dynamo graph is the one that is rewritten. Its targets are what the user wrote (``torch.softmax``, ``Tensor.view``),
so this module goes by names; what things *compute* is read from the shadow graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

CUT_TARGETS = frozenset(
    "linear conv1d conv2d conv3d embedding layer_norm group_norm batch_norm rms_norm cross_entropy".split()
)
"""Calls that neither attention nor its masks look through: their results are inputs of the shadow."""

SOFTMAX_TARGETS = frozenset("softmax _softmax scaled_dot_product_attention exp".split())
WHOLE = ("multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
"""Attention that Dynamo hands over as one call."""
CONTRACTIONS = frozenset("matmul bmm einsum baddbmm __matmul__ scaled_dot_product_attention mm".split())

_OPERATOR_WRITES = frozenset((operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior))


def target_name(n: Node) -> str:
    """``"softmax"`` for ``F.softmax``, ``torch.softmax`` and ``Tensor.softmax`` alike; "" for what is no call."""
    if n.op == "call_method":
        return str(n.target)
    if n.op != "call_function":
        return ""
    return getattr(n.target, "__name__", str(n.target)).split(".")[0]


def is_call(n: Node) -> bool:
    return n.op in ("call_function", "call_method", "call_module")


def value(n: Node) -> object:
    """The fake value that Dynamo recorded, or None."""
    return n.meta.get("example_value")


def is_higher_order(n: Node) -> bool:
    return isinstance(n.target, torch._ops.HigherOrderOperator)


def writes(n: Node) -> bool:
    """Whether the call writes into one of its arguments."""
    if n.op == "call_method":
        name = str(n.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or _inplace_dunder(name)
    if n.op != "call_function":
        return False
    if n.target in _OPERATOR_WRITES or n.kwargs.get("out") is not None or n.kwargs.get("inplace"):
        return True
    name = target_name(n)
    return name.endswith("_") and not name.endswith("__")


def _inplace_dunder(name: str) -> bool:
    return bool(re.fullmatch(r"__i(add|sub|mul|truediv|and|or|xor|matmul|floordiv|mod|pow)__", name))


def switches_mode(n: Node) -> bool:
    """Whether the call changes a global mode (grad, autocast): no tensor goes in or out."""
    if not is_call(n) or is_higher_order(n):
        return False
    module = getattr(n.target, "__module__", "") or ""
    name = target_name(n)
    return name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode") or (
        module.startswith("torch._C._functorch")
    )


def storage(n: Node) -> int | None:
    """An identity of the storage behind a tensor-valued node."""
    v = value(n)
    if not isinstance(v, torch.Tensor) or v.layout is not torch.strided:
        return None
    return v.untyped_storage()._cdata


def written_storages(nodes: Iterable[Node]) -> dict[int, Node]:
    """For each storage that is written in place: the last node that writes it."""
    out: dict[int, Node] = {}
    for n in nodes:
        if writes(n):
            for a in n.all_input_nodes[:1]:
                s = storage(a)
                if s is not None:
                    out[s] = n
    return out


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


def bodies(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """Graph modules that stay part of the program: bodies of checkpoints. Other higher-order calls are barriers."""
    for n in gm.graph.nodes:
        if n.op == "call_function" and is_higher_order(n) and "checkpoint" in str(n.target):
            for a in n.args:
                if isinstance(a, Node) and a.op == "get_attr":
                    body = getattr(gm, str(a.target), None)
                    if isinstance(body, GraphModule):
                        yield str(a.target), body


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
            todo.extend(n.all_input_nodes)
    return seen
