"""Softmaxes written by hand: weights ``e = exp(y)``, perhaps masked, divided by their sum, before or after ``@ v``; probabilities
that are masked and divided by their sum again; or the exponential of ``log_softmax(y)`` or of ``y - logsumexp(y)``.

A weight of zero is a logit of -inf, so the logit of a masked weight is a case tree: ``y`` where the mask lets it through. A
weight times a positive number c is a logit plus log(c), which drops out where all visible keys of a row have the same. What
keeps the divisor from zero (``clamp_min(1e-9)``) is a `Floor`, and `row_sums` says what becomes of it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from . import expr as x
from .expr import Expr

if TYPE_CHECKING:
    from .reader import Coords, Reader

EXPONENTIALS = {"exp": 1.0, "exp2": math.log(2), "special_exp2": math.log(2)}
"""The logarithms of their bases."""
SMALLEST = 2.0**-126
"""A floor below the normal numbers of float32 may be flushed to zero."""


class Guard(enum.Enum):
    """How a sum is kept from zero."""

    CLAMP = "clamped at"
    ADD = "increased by"
    REPLACE = "replaced, where it is zero, by"


@dataclass(frozen=True)
class Floor:
    """What a divisor is instead of a sum that may be zero.

    Attributes:
        guard: How.
        value: The number, as the dtype of the sum holds it.
        node: What computes it.
    """

    guard: Guard
    value: float
    node: Node

    def __str__(self) -> str:
        return f"{self.guard.value} {self.value:g}"


@dataclass(frozen=True)
class Normalised:
    """A division by the sum of weights, or the exponential of normalised logits.

    Attributes:
        weights: The node e; of an exponential, the logits y.
        axis: Which of its axes is summed.
        numerator: What is divided; None for an exponential.
        divisor: From the divisor, or its inverse, down to the sum.
        floor: What keeps the sum from zero.
    """

    weights: Node
    axis: int
    numerator: Node | None = None
    divisor: tuple[Node, ...] = ()
    floor: Floor | None = None

    @property
    def deferred(self) -> bool:
        """Whether the division comes after the contraction with the values."""
        return self.numerator is not None and self.numerator is not self.weights


def match(r: Reader, n: Node) -> Normalised | None:
    """What `n` normalises, or None if it is another quotient, product or exponential."""
    from .nodes import is_tensor, op_name, rank

    if op_name(n) == "exp":
        return _normalised_logits(n.args[0]) if is_tensor(n.args[0]) else None
    for numerator, divisor, inverted in _quotients(n):
        found = _divisor(r, divisor, inverted)
        if found is None:
            continue
        path, floor, kept = found
        weights, axis, _ = _summed(path[-1])
        if not is_weights(weights):
            continue
        if numerator is weights and kept and rank(n) == rank(weights) or _contracts(numerator, weights):
            return Normalised(weights, axis, numerator, path, floor)
    return None


def _quotients(n: Node) -> Iterator[tuple[Node, Node, bool]]:
    """``a / b``, or ``a * b`` where b may be an inverse: (a, b, whether it is)."""
    from .nodes import is_tensor, op_name

    if op_name(n) not in ("div", "mul") or len(n.args) < 2 or not all(is_tensor(a) for a in n.args[:2]):
        return
    a, b = n.args[:2]
    if op_name(n) == "mul":
        yield a, b, True
        yield b, a, True
    elif n.kwargs.get("rounding_mode") is None:
        yield a, b, False


def _divisor(r: Reader, n: Node, inverted: bool) -> tuple[tuple[Node, ...], Floor | None, bool] | None:
    """From a divisor, or an inverse of one, down to the sum of a row.

    Returns:
        The nodes, the floor, and whether the axis is kept or put back.
    """
    from .nodes import axis, constant_factor, op_name, rank

    path, floor, restored = [n], None, None
    while (found := _summed(n)) is None or inverted:
        guarded = _floored(r, n) if floor is None and not inverted else None
        if op_name(n) == "unsqueeze" and restored is None:
            restored = axis(n.args[1], rank(n))
            n = n.args[0]
        elif op_name(n) == "expand":
            n = n.args[0]
        elif inverted and constant_factor(n) is not None and op_name(n) == "mul" and constant_factor(n)[1] == 1:
            n = constant_factor(n)[0]
        elif inverted and _inverse_of(n) is not None:
            n, inverted = _inverse_of(n), False
        elif guarded is not None:
            floor, n = guarded
        else:
            return None
        path.append(n)
    _, d, keepdim = found
    return tuple(path), floor, keepdim != (restored == d)


def _inverse_of(n: Node) -> Node | None:
    """``1 / t``: t."""
    from .nodes import is_tensor, op_name

    if op_name(n) == "reciprocal" or op_name(n) == "pow" and n.args[1] == -1:
        return n.args[0]
    return n.args[1] if op_name(n) == "div" and n.args[0] == 1 and is_tensor(n.args[1]) else None


def _floored(r: Reader, n: Node) -> tuple[Floor | None, Node] | None:
    """``max(t, eps)``, ``t + eps`` or ``t if t != 0 else 1``: the floor and t."""
    from .nodes import argument, dtype, is_tensor, op_name, rounded

    name, args = op_name(n), n.args
    guard, source, value = None, args[0] if args else None, None
    if name in ("clamp", "clamp_min", "clip") and (name == "clamp_min" or argument(n, 2, "max") is None):
        guard, value = Guard.CLAMP, _number(r, argument(n, 1, "min"))
    elif name in ("maximum", "add") and argument(n, 2, "alpha", 1) == 1:
        source, other = args[:2] if _number(r, args[0]) is None else args[1::-1]
        guard, value = Guard.CLAMP if name == "maximum" else Guard.ADD, _number(r, other)
    elif name == "masked_fill" and _zero_test(args[1], args[0]) is True:
        guard, value = Guard.REPLACE, _number(r, args[2])
    elif name == "where" and len(args) == 3 and is_tensor(args[0]):
        for source, other, zero in ((args[2], args[1], True), (args[1], args[2], False)):
            if _zero_test(args[0], source) is zero:
                guard, value = Guard.REPLACE, _number(r, other)
                break
    if guard is None or value is None or not is_tensor(source) or dtype(source) != dtype(n):
        return None
    value = rounded(value, dtype(n))
    if value == 0 and guard is not Guard.REPLACE:
        return None, source
    return (Floor(guard, value, n), source) if SMALLEST <= value < math.inf else None


def _number(r: Reader, v: object) -> float | None:
    """The number that all elements of an argument are, if that is known."""
    from .nodes import is_tensor, op_name
    from .reader import CREATIONS, Mode

    if isinstance(v, (int, float)) and not isinstance(v, bool):
        return float(v)
    if not is_tensor(v):
        return None
    assert isinstance(v, Node)
    if op_name(v) not in CREATIONS and any(s is not x.ONE for s in r.shape(v)):
        return None
    return x.constant_real(r.read(v, [x.var(f"{v.name}.at{d}", s) for d, s in enumerate(r.shape(v))], Mode.VALUE))


def _zero_test(n: Node, t: Node) -> bool | None:
    """Whether a truth says that the non-negative `t` is zero, or that it is not."""
    from .nodes import op_name

    if op_name(n) not in ("eq", "ne", "gt", "le") or n.args[0] is not t or n.args[1] != 0:
        return None
    return op_name(n) in ("eq", "le")


def _normalised_logits(n: Node) -> Normalised | None:
    """``log_softmax(y)``, or ``y - logsumexp(y)`` with the axis kept or put back."""
    from .nodes import argument, axis, is_tensor, op_name, rank

    if op_name(n) in ("log_softmax", "_log_softmax", "special_log_softmax"):
        return Normalised(n.args[0], axis(n.args[1], rank(n)))
    if op_name(n) != "sub" or not all(is_tensor(a) for a in n.args[:2]) or argument(n, 2, "alpha", 1) != 1:
        return None
    total, restored = n.args[1], None
    if op_name(total) == "unsqueeze":
        total, restored = total.args[0], axis(total.args[1], rank(total))
    found = _reduced(total, 1) if op_name(total) == "logsumexp" else None
    if found is None or found[0] is not n.args[0] or found[2] == (restored == found[1]):
        return None
    return Normalised(found[0], found[1])


def _summed(n: Node) -> tuple[Node, int, bool] | None:
    """``t.sum(d)``, or its norm with p = 1, which is the same of what is not negative: (t, d, whether the axis is kept)."""
    from .nodes import op_name

    if op_name(n) == "linalg_vector_norm":
        return _reduced(n, 2) if len(n.args) > 1 and n.args[1] == 1 else None
    return _reduced(n, 1) if op_name(n) == "sum" else None


def _reduced(n: Node, position: int) -> tuple[Node, int, bool] | None:
    """The source of a reduction, its only axis, and whether that is kept."""
    from .nodes import argument, axis, rank

    dims = argument(n, position, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or len(dims) != 1:
        return None
    return n.args[0], axis(dims[0], rank(n.args[0])), bool(argument(n, position + 1, "keepdim", False))


def is_weights(n: Node) -> bool:
    """Whether a node is exp of something, or probabilities; moved or masked to zero."""
    from .nodes import is_tensor, op_name
    from .reader import MOVES, SOFTMAXES

    name = op_name(n)
    if name in EXPONENTIALS or name in SOFTMAXES:
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
    from .reader import Mode, SOFTMAXES, Unreadable

    name = op_name(n)
    if name in EXPONENTIALS:
        return x.scaled(r.read(n.args[0], c, Mode.FORMULA), EXPONENTIALS[name])
    if name in SOFTMAXES:
        return x.map_cases(r.logit(n, c), lambda t: t if t.op == "const" else x.add_reals(t, x.scaled(normaliser(r, n, c), -1)))
    if name == "masked_fill" and x.constant_real(r.operand(n, n.args[2], c, Mode.VALUE)) == 0:
        masked = x.truth(r.operand(n, n.args[1], c, Mode.VALUE))
        return x.select(masked, x.real(-math.inf), logit(r, n.args[0], r.align(n.args[0], c)))
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


def normaliser(r: Reader, n: Node, c: Coords) -> Expr:
    """The logarithm of what the softmax `n` divides by: a datum of its row, named by the row's first probability."""
    _, d = r.softmax_axis(n)
    return x.load(n.name, (*c[:d], x.ZERO, *c[d + 1 :]))


@dataclass(frozen=True)
class Core:
    """Weights below what masks them.

    Attributes:
        node, coords: The exponential or softmax, and the element of it.
        kept: Where the weights are that element.
        multiplied: Whether they are zero elsewhere because of a product, which does not remove a NaN.
    """

    node: Node
    coords: Coords
    kept: Expr = x.TRUE
    multiplied: bool = False


def core(r: Reader, n: Node, c: Coords) -> Core | None:
    """Element `c` of the weights `n` as one element that masks let through or set to zero; None if it is something else."""
    from .nodes import is_tensor, op_name
    from .reader import Mode, SOFTMAXES

    name = op_name(n)
    if name in EXPONENTIALS or name in SOFTMAXES:
        return Core(n, c)
    if name == "masked_fill":
        inner, kept, product = n.args[0], x.negate(x.truth(r.operand(n, n.args[1], c, Mode.VALUE))), False
    elif name == "where":
        first = is_tensor(n.args[1]) and is_weights(n.args[1])
        inner, condition, product = n.args[1 if first else 2], x.truth(r.operand(n, n.args[0], c, Mode.VALUE)), False
        kept = condition if first else x.negate(condition)
        if first and is_tensor(n.args[2]) and is_weights(n.args[2]):
            return None
    elif name == "mul":
        inner, mask = n.args[:2] if is_tensor(n.args[0]) and is_weights(n.args[0]) else n.args[1::-1]
        factors = list(x.cases(r.coerce(n, r.operand(n, mask, c, Mode.VALUE))))
        if any(t not in (x.real(0), x.real(1)) for _, t in factors):
            return None
        kept, product = x.disj(*(g for g, t in factors if t is x.real(1))), True
    else:
        step = r.move(n, c, Mode.FORMULA)
        return core(r, step.source, step.coords) if step is not None and step.guard is x.TRUE else None
    found = core(r, inner, r.align(inner, c))
    if found is None:
        return None
    return Core(found.node, found.coords, x.conj(found.kept, kept), found.multiplied or product and kept is not x.TRUE)
