"""Softmaxes written by hand: weights ``e = exp(y)``, perhaps masked, divided by their sum, before or after ``@ v``; or the
exponential of ``log_softmax(y)`` or of ``y - logsumexp(y)``.

A weight of zero is a logit of -inf, so the logit of a masked weight is a case tree: ``y`` where the mask lets it through. A
weight times a positive number c is a logit plus log(c), which drops out where all visible keys of a row have the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from . import expr as x
from .expr import Expr

if TYPE_CHECKING:
    from .reader import Coords, Reader


@dataclass(frozen=True)
class Normalised:
    """A division by the sum of weights, or the exponential of normalised logits.

    Attributes:
        weights: The node e; of an exponential, the logits y.
        axis: Which of its axes is summed.
        deferred: Whether the division comes after the contraction with the values.
    """

    weights: Node
    axis: int
    deferred: bool


def match(r: Reader, n: Node) -> Normalised | None:
    """What `n` normalises, or None if it is another division or exponential."""
    from .nodes import is_tensor, op_name

    if op_name(n) == "exp":
        return _normalised_logits(n.args[0]) if is_tensor(n.args[0]) else None
    if op_name(n) != "div" or len(n.args) < 2 or not all(is_tensor(a) for a in n.args[:2]):
        return None
    numerator, total = n.args[:2]
    found = _reduction(total, "sum", through=("expand", "unsqueeze"))
    if found is None:
        return None
    weights, axis, kept = found
    if not is_weights(weights):
        return None
    if numerator is weights:
        return Normalised(weights, axis, deferred=False) if kept else None
    return Normalised(weights, axis, deferred=True) if _contracts(numerator, weights) else None


def _normalised_logits(n: Node) -> Normalised | None:
    """``log_softmax(y)``, or ``y - logsumexp(y)`` with the axis kept or put back."""
    from .nodes import argument, axis, is_tensor, op_name, rank

    if op_name(n) in ("log_softmax", "_log_softmax"):
        return Normalised(n.args[0], axis(n.args[1], rank(n)), deferred=False)
    if op_name(n) != "sub" or not all(is_tensor(a) for a in n.args[:2]) or argument(n, 2, "alpha", 1) != 1:
        return None
    found = _reduction(n.args[1], "logsumexp", through=("unsqueeze",))
    return Normalised(found[0], found[1], deferred=False) if found is not None and found[0] is n.args[0] and found[2] else None


def _reduction(n: Node, name: str, through: tuple[str, ...]) -> tuple[Node, int, bool] | None:
    """``y.name(d)``, perhaps under the ops `through`: (y, d, whether the axis is kept or put back)."""
    from .nodes import argument, axis, op_name, rank

    restored = None  # the dimension that an unsqueeze puts back
    while op_name(n) in through:
        if op_name(n) == "unsqueeze":
            if restored is not None:
                return None
            restored = axis(n.args[1], rank(n))
        n = n.args[0]
    if op_name(n) != name:
        return None
    source, dims = n.args[0], argument(n, 1, "dim")
    if isinstance(dims, int):
        dims = [dims]
    if not dims or len(dims) != 1:
        return None
    d = axis(dims[0], rank(source))
    keepdim = bool(argument(n, 2, "keepdim", False))
    return source, d, keepdim != (restored == d)


def is_weights(n: Node) -> bool:
    """Whether a node is exp of something, moved or masked to zero."""
    from .nodes import is_tensor, op_name
    from .reader import MOVES

    name = op_name(n)
    if name == "exp":
        return True
    if name in ("mul", "where"):
        return any(is_tensor(a) and is_weights(a) for a in n.args)
    return (name == "masked_fill" or name in MOVES) and is_tensor(n.args[0]) and is_weights(n.args[0])


def _contracts(n: Node, weights: Node) -> bool:
    """Whether a contraction has the weights, or a view of them, as an operand."""
    from .nodes import is_tensor, op_name
    from .reader import MOVES

    operands: Sequence[object]
    if op_name(n) == "sum" and is_tensor(n.args[0]) and op_name(n.args[0]) in ("mul", "multiply"):
        operands = n.args[0].args
    elif op_name(n) in ("matmul", "bmm", "einsum"):
        operands = n.args[1] if op_name(n) == "einsum" else n.args
    else:
        return False
    for a in operands:
        while a is not weights and is_tensor(a) and op_name(a) in MOVES and is_tensor(a.args[0]):
            a = a.args[0]
        if a is weights:
            return True
    return False


def logit(r: Reader, n: Node, c: Coords) -> Expr:
    """The logit behind element `c` of the weights `n`.

    Raises:
        Unreadable: If the weights are multiplied by something that is not zero or a positive number, which adds its logarithm.
    """
    from .nodes import is_tensor, op_name
    from .reader import Mode, Unreadable

    name = op_name(n)
    if name == "exp":
        return r.read(n.args[0], c, Mode.FORMULA)
    if name == "masked_fill" and x.constant_real(r.operand(n, n.args[2], c, Mode.VALUE)) == 0:
        return x.select(x.truth(r.operand(n, n.args[1], c, Mode.VALUE)), x.real(-math.inf), logit(r, n.args[0], c))
    if name == "where":
        cond, a, b = n.args
        left, right = (logit(r, v, r.align(v, c)) if is_tensor(v) and is_weights(v) else _zero(r, n, v, c) for v in (a, b))
        return x.select(x.truth(r.operand(n, cond, c, Mode.VALUE)), left, right)
    if name == "mul":
        e, mask = n.args[:2] if is_tensor(n.args[0]) and is_weights(n.args[0]) else n.args[1::-1]
        inner = logit(r, e, r.align(e, c))

        def leaf(t: Expr) -> Expr:
            # Adding -inf, not replacing by it: the gradient of a masked weight is a product with zero, NaN for an empty row.
            if t.op != "const" or not 0 <= t.args[0] < math.inf:
                raise Unreadable(f"{n.name}: weights multiplied by something that is not a mask")
            return x.add_reals(inner, x.real(math.log(t.args[0]))) if t.args[0] else x.add_to_infinity(inner)

        return x.map_cases(r.coerce(n, r.operand(n, mask, c, Mode.VALUE)), leaf)
    step = r.move(n, c, Mode.FORMULA)
    if step is None or step.guard is not x.TRUE:
        raise Unreadable(f"{n.name}: weights of a hand-made softmax")
    return logit(r, step.source, step.coords)


def _zero(r: Reader, n: Node, v: object, c: Coords) -> Expr:
    from .reader import Mode, Unreadable

    if x.constant_real(r.coerce(n, r.operand(n, v, c, Mode.VALUE))) != 0:
        raise Unreadable(f"{n.name}: weights replaced by something that is not zero")
    return x.real(-math.inf)
