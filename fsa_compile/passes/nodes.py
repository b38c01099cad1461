"""Asking a shadow node for its op, arguments, dtype and rank, and what its dtype can hold."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from . import expr as x
from .expr import Expr


def op_name(n: Node) -> str:
    """``"view"`` for ``aten.view.default``; ``"getitem"`` for an element of a tuple; "" for no call."""
    if n.op != "call_function":
        return ""
    if n.target is operator.getitem:
        return "getitem"
    schema = getattr(n.target, "_schema", None)
    if schema is None:
        return getattr(n.target, "__name__", str(n.target))
    # A custom op of the same name is another op: only aten is known.
    return schema.name.removeprefix("aten::")


def argument(n: Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call, positional or by keyword."""
    return n.args[position] if len(n.args) > position else n.kwargs.get(name, default)


def dtype(n: Node) -> torch.dtype:
    return n.meta["val"].dtype


def is_tensor(n: Any) -> bool:
    return isinstance(n, Node) and isinstance(n.meta.get("val"), torch.Tensor)


def is_real(n: Node) -> bool:
    return dtype(n).is_floating_point


def is_int(n: Node) -> bool:
    return not is_real(n) and dtype(n) != torch.bool and not dtype(n).is_complex


def rank(n: Node) -> int:
    return n.meta["val"].dim()


def picked(n: Node) -> torch.Tensor:
    """The (fake) indices of a top-k or sort, its second result, or of an argsort."""
    value = n.meta["val"]
    return value if isinstance(value, torch.Tensor) else value[1]


def axis(d: int, r: int) -> int:
    """A possibly negative dimension as an index."""
    return d + r if d < 0 else d


def constant_factor(n: Node) -> tuple[Node, float] | None:
    """``source * c`` or ``source / c`` with a Python number: (source, factor)."""
    if op_name(n) not in ("mul", "div"):
        return None
    a, b = n.args[:2]
    if isinstance(a, Node) and isinstance(b, (int, float)) and not isinstance(b, bool):
        if op_name(n) == "mul":
            return a, float(b)
        return (a, 1.0 / b) if b and n.kwargs.get("rounding_mode") is None else None
    if isinstance(b, Node) and isinstance(a, (int, float)) and op_name(n) == "mul":
        return b, float(a)
    return None


def literal(v: Any, dt: torch.dtype) -> Expr:
    """A Python number as an element of a tensor of that dtype."""
    if dt == torch.bool:
        return x.boolean(bool(v))
    return x.real(rounded(float(v), dt)) if dt.is_floating_point else x.integer(int(v))


def rounded(v: float, dt: torch.dtype) -> float:
    """A constant as a tensor of that dtype holds it."""
    return torch.tensor(v, dtype=torch.float64).to(dt).to(torch.float64).item()


def exact(e: Expr, dt: torch.dtype) -> bool:
    """Whether integers that `e` stands for are held exactly by the dtype: bfloat16 cannot count beyond 256."""
    if dt.is_floating_point:
        limit = 2 / torch.finfo(dt).eps
        return all(-limit <= t.args[0].lo and t.args[0].hi <= limit for _, t in x.cases(e) if t.op == "float")
    if e.sort == x.INT:
        info = torch.iinfo(dt)
        if info.bits < 32 or not math.isinf(e.lo) and not math.isinf(e.hi):
            return info.min <= e.lo and e.hi <= info.max
    return True


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one floating-point dtype is one of the other."""
    if wide == narrow or not (wide.is_floating_point and narrow.is_floating_point):
        return wide == narrow
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny
