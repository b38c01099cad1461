"""`flex_attention` in a Dynamo graph: its arguments, and whether its block tables say what its mask function says.

A `BlockMask` holds its mask twice: as a function of (batch, head, query, key), and as tables of the blocks that are computed
at all. torch's eager `flex_attention` applies the function everywhere and never looks at the tables; its kernels skip what the
tables do not list, and skip the function in blocks that are listed as full. The call has one meaning only if both agree.

They agree if the tables were made by torch's `create_block_mask` from the same function: a block is then listed as full where
all its elements are visible, as partial where some are, and not at all where none is. That is recognised here by structure:
the chain of calls from the dense mask to the tables, and the dense mask as the same computation as the function's graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import dynamo_graph as dg

NO_BLOCKS = 1 << 30
"""The block size of the mask that torch makes where the user gave none: one block, larger than any sequence."""
_SAME = {
    "__getitem__": "getitem", "index": "getitem", "floordiv": "floor_divide", "__floordiv__": "floor_divide",
    "__and__": "and_", "__or__": "or_", "__xor__": "xor", "__invert__": "invert",
    "__le__": "le", "__lt__": "lt", "__ge__": "ge", "__gt__": "gt", "__eq__": "eq", "__ne__": "ne",
    "__add__": "add", "__sub__": "sub", "__mul__": "mul", "mod": "remainder", "__mod__": "remainder",
}  # fmt: skip
"""Names under which the same call stands in a mask function's graph and in a traced `create_block_mask`."""


@dataclass(frozen=True)
class FlexCall:
    """The arguments of a `flex_attention` node.

    Attributes:
        node: The call in the Dynamo graph. Its results are output, log-sum-exp and maxima.
        q, k, v: The operands, ``(b, hq, n, dk)``, ``(b, hkv, m, dk)``, ``(b, hkv, m, dv)``.
        score: Graph of the score function (score, batch, head, query, key, captured values).
        mask: Graph of the mask function (batch, head, query, key, captured values).
        tables: The `BlockMask` as torch passes it, without the mask function.
        scale: What multiplies the product of queries and keys before the score function; None if it is not known.
        score_captured, mask_captured: What the functions capture: nodes or numbers.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    score: GraphModule
    mask: GraphModule
    tables: tuple[Any, ...]
    scale: float | None
    score_captured: tuple[Any, ...]
    mask_captured: tuple[Any, ...]

    @property
    def inputs(self) -> list[Node]:
        """What the result depends on; not the tables."""
        return [a for a in (self.q, self.k, self.v, *self.score_captured, *self.mask_captured) if isinstance(a, Node)]


def flex_call(n: Node) -> FlexCall | None:
    """The arguments of a call of `flex_attention`; None if the node is another call."""
    if not dg.is_flex(n):
        return None
    q, k, v, score, block_mask, scale, _, *captured = n.args
    score_captured, mask_captured = captured if captured else ((), ())
    gm = n.graph.owning_module
    *tables, mask = block_mask  # type: ignore[misc]
    return FlexCall(
        n, q, k, v, getattr(gm, score.target), getattr(gm, mask.target), tuple(tables), _number(scale),  # type: ignore[union-attr, arg-type]
        tuple(score_captured), tuple(mask_captured),  # type: ignore[arg-type]
    )  # fmt: skip


def _number(scale: Any) -> float | None:
    """A scale as a number: that of a symbolic one only if its sizes turned out to be static."""
    scale = dg.value(scale) if isinstance(scale, Node) else scale
    if isinstance(scale, torch.SymFloat):
        return float(scale.node.expr) if scale.node.expr.is_number else None
    return float(scale)


def why_inconsistent(call: FlexCall) -> str | None:
    """Why the block tables are not known to agree with the mask function; None if they are."""
    kv_num, kv_indices, full_num, full_indices = call.tables[2:6]
    q_block, kv_block = call.tables[-2:]
    if q_block == kv_block == NO_BLOCKS and _is_one_block(kv_num, kv_indices) and full_num is None:
        return None
    if any(isinstance(t, Node) and _is_given(t) for t in (kv_num, kv_indices, full_num, full_indices)):
        return (
            "the block mask was made outside of the compiled code: its tables are run-time data, which may not agree with its "
            "mask function; call create_block_mask inside"
        )
    partial, full = _dense_blocks(kv_num, kv_indices), None
    if full_num is not None:
        full = _dense_blocks(full_num, full_indices)
    dense = _counted(partial, full, full_num is not None, q_block, kv_block)
    if dense is None:
        return "the tables of the block mask are not those of create_block_mask, and may not agree with its mask function"
    return _why_other_mask(call, dense)


def _is_given(t: Node) -> bool:
    """Whether a table is an input, perhaps moved or cast."""
    while t.op not in ("placeholder", "get_attr"):
        if dg.target_name(t) not in ("to", "view", "contiguous", "clone", "expand") or not t.all_input_nodes:
            return False
        t = t.all_input_nodes[0]
    return True


def _is_one_block(num: Any, indices: Any) -> bool:
    return (dg.target_name(num), dg.target_name(indices)) == ("ones", "zeros") and all(
        s == 1 for t in (num, indices) for s in dg.value(t).shape
    )


# -- from the tables to the dense mask
def _step(n: Any, name: str, *args: Any, **kwargs: Any) -> Node | None:
    """The first argument of the call `n`, if it is a call of that name with those further arguments."""
    if not isinstance(n, Node) or _name(n) != name or not n.args or not isinstance(n.args[0], Node):
        return None
    given = {k: v for k, v in n.kwargs.items() if k != "memory_format"}
    return n.args[0] if (tuple(n.args[1:]), given) == (args, kwargs) else None


def _cast(n: Any, dtype: torch.dtype) -> Node | None:
    return _step(n, "to", dtype) or _step(n, "to", dtype=dtype)


def _dense_blocks(num: Any, indices: Any) -> Node | None:
    """The truths ``(b, h, q blocks, kv blocks)`` that torch's ``_dense_to_ordered`` made a count and a list of."""
    counted = _step(_cast(num, torch.int32), "sum", dim=-1)
    listed = _step(_cast(indices, torch.int32), "argsort", dim=-1, descending=True, stable=True)
    if counted is None or counted is not listed:
        return None
    return _cast(_cast(counted, torch.int32), torch.int8)


def _counted(partial: Node | None, full: Node | None, separate: bool, q_block: Any, kv_block: Any) -> Node | None:
    """The dense mask whose sum per block decides which blocks are partial and which are full."""
    if not isinstance(q_block, int) or not isinstance(kv_block, int) or partial is None:
        return None
    area = q_block * kv_block
    if separate:
        if _name(partial) != "and_" or len(partial.args) != 2:
            return None
        some, below = partial.args
        count = _step(some, "gt", 0)
        if count is None or count is not _step(below, "lt", area) or count is not _step(full, "eq", area):
            return None
    else:
        count = _step(partial, "gt", 0)
    tiles = _step(_step(count, "sum", dim=[-2, -1]), "permute", 0, 1, 2, 4, 3, 5)
    if tiles is None or _name(tiles) != "view" or (tiles.args[4], tiles.args[6]) != (q_block, kv_block):
        return None
    padded = tiles.args[0]
    if not isinstance(padded, Node) or _name(padded) != "pad":
        return None
    mask, sides, *how = padded.args
    before = (sides[0], sides[2]) if isinstance(sides, (tuple, list)) and len(sides) == 4 else None  # type: ignore[misc]
    if before != (0, 0) or how not in ([], ["constant"], ["constant", None]) or padded.kwargs:
        return None
    return mask if isinstance(mask, Node) else None


# -- from the dense mask to the function
def _why_other_mask(call: FlexCall, dense: Node) -> str | None:
    """Whether a dense mask is the function at all coordinates, as torch's ``create_mask`` maps it over them."""
    unknown = "the block mask's tables were not made from its own mask function"
    levels: list[int] = []
    body: Any = dense
    for _ in range(4):
        if _name(body) != "_remove_batch_dim" or body.args[3] != 0:
            return unknown
        levels.append(body.args[1])
        body = body.args[0]
    placeholders = [n for n in call.mask.graph.nodes if n.op == "placeholder"]
    given = dict(zip(placeholders[4:], call.mask_captured))
    coordinates = dict(zip(placeholders[:4], levels))
    (result,) = next(n for n in call.mask.graph.nodes if n.op == "output").args
    if isinstance(result, (tuple, list)):
        (result,) = result
    if len(set(levels)) != 4 or not _Comparison(coordinates, given).same(result, body):
        return unknown
    shape, q, k = (dg.value(n).shape for n in (dense, call.q, call.k))  # type: ignore[union-attr]
    for placeholder, made, needed in zip(placeholders, shape, (q[0], q[1], q[2], k[2])):
        if not _same_size(made, needed) and not (made == 1 and not placeholder.users and placeholder in placeholders[:2]):
            return f"the block mask was made for {made} in a dimension where the attention has {needed}"
    if any(_written_since(dense, t) for t in call.mask_captured if isinstance(t, Node)):
        return "a tensor that the mask function reads is written in place: the tables may be older than the mask"
    return None


def _written_since(dense: Node, captured: Node) -> bool:
    """Whether a captured tensor is written after the dense mask was begun: `scatter_` into a new table comes before."""
    order = {n: k for k, n in enumerate(captured.graph.nodes)}
    made_of = dg.ancestors([dense], frozenset())
    first = min((order[u] for u in captured.users if u in made_of), default=-1)
    return any(order[w] > first for w in dg.writers(order).get(dg.storage(captured), ()))  # type: ignore[arg-type]


class _Comparison:
    """Whether nodes of a mask function's graph are the same computation as nodes of a traced `create_block_mask`.

    Args:
        levels: For each placeholder of a coordinate: the level of the vmap that maps over it.
        given: For each placeholder of a captured value: the value.
    """

    def __init__(self, levels: Mapping[Node, int], given: Mapping[Node, Any]) -> None:
        self.levels, self.given = levels, given
        self._known: dict[tuple[Node, Node], bool] = {}

    def same(self, a: Any, b: Any) -> bool:
        if isinstance(a, (tuple, list)):
            return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(self.same, a, b))
        if not isinstance(a, Node):
            return type(a) is type(b) and a == b
        if a in self.given:
            return self.given[a] is b
        if not isinstance(b, Node):
            return False
        if (a, b) not in self._known:
            self._known[a, b] = self._same_node(a, b)
        return self._known[a, b]

    def _same_node(self, a: Node, b: Node) -> bool:
        if a in self.levels:
            counts = _step(b, "_add_batch_dim", 0, self.levels[a])
            return counts is not None and _counts_up(counts)
        if not dg.is_call(a) or _name(a) != _name(b):
            return False
        (left, by_name), (right, theirs) = _arguments(a), _arguments(b)
        return by_name.keys() == theirs.keys() and self.same((*left, *by_name.values()), (*right, *(theirs[k] for k in by_name)))


def _counts_up(n: Node) -> bool:
    """``torch.arange(0, size)``."""
    return _name(n) == "arange" and len(n.args) == 2 and n.args[0] == 0 and n.kwargs.keys() <= {"device"}


def _arguments(n: Node) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of a call; an index is a list of its entries whatever the call is spelled like."""
    args = n.args
    if _name(n) == "getitem" and len(args) == 2:
        args = (args[0], list(args[1]) if isinstance(args[1], (tuple, list)) else [args[1]])
    return args, dict(n.kwargs)


def _name(n: Any) -> str:
    if not isinstance(n, Node):
        return ""
    name = dg.target_name(n)
    return _SAME.get(name, name)


def _same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are one number or one symbolic expression; asking torch would add a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr
