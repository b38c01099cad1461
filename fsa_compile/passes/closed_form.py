"""The value of a tensor as an expression in its coordinates: a triangle, a band, a map from positions to blocks.

`fit` guesses and `_exceptions` decides: an expression is returned only if it gives every element of the tensor. That is a
proof by evaluation, for this value and no other; who relies on it must see to it that the value is still the same when the
code runs (`fsa_compile/buffers.py`). A few elements that break the rule become cases of the expression, so that a mask with
one bit flipped is refused with that bit as the counterexample.

What is known:

* constants, also along some of the axes;
* integers: ``a * ((i + o) // B) + b``, perhaps clamped; ``a * (i % B) + b``; sums of such functions of two coordinates;
* truths: each row an interval between two such functions, or each row's complement one;
* reals: integers, and truths in disguise (0 and -inf).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import expr as x
from .evaluate import TensorEvaluator
from .expr import Expr
from .nodes import literal

LARGEST = 2**26
"""Elements of the largest tensor that is read: an 8192 x 8192 mask, which takes about a second."""
EXCEPTIONS = 4
"""So many elements may break the rule."""
_CHUNK = 2**21


@dataclass(frozen=True)
class ClosedForm:
    """A tensor's value.

    Attributes:
        axes: One variable per dimension.
        element: The element, as an expression over the axes.
    """

    axes: tuple[Expr, ...]
    element: Expr

    def at(self, coords: Sequence[Expr]) -> Expr:
        """The element at other coordinates, which must lie within the tensor."""
        mapping = {v: c for v, c in zip(map(x.as_var, self.axes), coords) if v is not None}
        return x.substitute(self.element, mapping)


def fit(t: Tensor) -> ClosedForm | None:
    """The closed form of a tensor, or None if none is known or the tensor is too large.

    Args:
        t: Any dtype; no element is taken on trust.
    """
    if t.numel() == 0 or t.numel() > LARGEST or t.is_complex():
        return None
    t = t.detach().cpu()
    axes = tuple(x.var(f"axis{k}", s) if s > 1 else x.ZERO for k, s in enumerate(t.shape))
    moving = [k for k, s in enumerate(t.shape) if s > 1 and not _same_along(t, k)]
    part = t[tuple(slice(None) if k in moving else 0 for k in range(t.dim()))]
    for guess in _guesses(part, [axes[k] for k in moving]):
        element = _with_exceptions(guess, part, [axes[k] for k in moving])
        if element is not None:
            return ClosedForm(axes, element)
    return None


def _same_along(t: Tensor, d: int) -> bool:
    first = t.narrow(d, 0, 1)
    return torch.equal(t, first.expand_as(t))


# -- guesses
def _guesses(t: Tensor, axes: Sequence[Expr]) -> Iterator[Expr]:
    if t.dim() == 0:
        yield literal(t.item(), t.dtype)
    elif t.dim() > 2:
        return
    elif t.dtype == torch.bool:
        yield from _truths(t, axes)
    elif t.is_floating_point():
        yield from _reals(t, axes)
    else:
        yield from _two_values(t, axes)
        yield from _integers(t.long(), axes)


def _reals(t: Tensor, axes: Sequence[Expr]) -> Iterator[Expr]:
    yield from _two_values(t, axes)
    if bool((t != t.round()).any()):
        return
    whole = t.double()
    if float(whole.abs().max()) < 2**53:
        yield from map(x.from_int, _integers(whole.long(), axes))


def _two_values(t: Tensor, axes: Sequence[Expr]) -> Iterator[Expr]:
    """A truth in disguise: 0 and 1, 0 and -inf."""
    low, high = t.min(), t.max()
    upper = t == high
    if bool((upper | (t == low)).all()):
        for e in _truths(upper, axes):
            yield x.select(e, literal(high.item(), t.dtype), literal(low.item(), t.dtype))


def _truths(t: Tensor, axes: Sequence[Expr]) -> Iterator[Expr]:
    """Rows that are intervals ``low(i) <= j < high(i)``, or whose complements are."""
    *rows, j = axes
    for negated in (False, True):
        table = (~t if negated else t).reshape(-1, t.shape[-1]).byte()
        seen = table.sum(1, dtype=torch.long)
        some = seen > 0
        index = torch.arange(len(table))
        low = table.argmax(1)
        high = low + seen
        width = t.shape[-1]
        i = rows[0] if rows else x.ZERO
        for f, g in ((f, g) for f in _sequences(index[some], low[some], i) for g in _sequences(index[some], high[some], i)):
            a, b = (_on(e, rows, len(table)).clamp(0, width) for e in (f, g))
            wrong = torch.where(some, (a != low) | (b != high), a < b)
            if int(wrong.sum()) <= EXCEPTIONS:
                inside = x.conj(x.at_least(j, f), x.less(j, g))
                yield x.negate(inside) if negated else inside


def _integers(t: Tensor, axes: Sequence[Expr]) -> Iterator[Expr]:
    if t.dim() == 1:
        index = torch.arange(len(t))
        yield from _sequences(index, t, axes[0])
        yield from _sawtooth(t, axes[0])
        return
    i, j = axes
    rows, columns = (torch.arange(s) for s in t.shape)
    for f in _sequences(rows, t[:, 0], i):
        for g in _sequences(columns, t[0] - t[0, 0], j):
            yield x.plus(f, g)
    # A plane that is cut off below or above: positions of a window's keys, clamped into range.
    p, q = (min(s // 2, s - 2) for s in t.shape)
    down, right = int(t[p + 1, q] - t[p, q]), int(t[p, q + 1] - t[p, q])
    plane = x.plus(x.plus(x.times(i, down), x.times(j, right)), int(t[p, q]) - down * p - right * q)
    yield x.clamp(plane, int(t.min()), int(t.max()))


def _sequences(index: Tensor, values: Tensor, i: Expr) -> Iterator[Expr]:
    """Functions ``a * ((i + o) // B) + b`` near the values at some indices, then the same clamped to the values' range."""
    if len(values) == 0:
        yield x.ZERO
        return
    steps = values.diff()
    changes = (steps != 0).nonzero().flatten()
    usual = values.mode().values
    if int((values != usual).sum()) <= EXCEPTIONS or x.constant(i) is not None:
        yield x.integer(int(usual))
    if len(changes) == 0 or x.constant(i) is not None:
        return
    a = int(steps[changes].mode().values)
    at = index[changes + 1]  # where the new value starts
    period = int(at.diff().mode().values) if len(at) > 1 else int(index[-1]) + 1
    if period < 1:
        return
    offset = -int((at % period).mode().values) % period
    staircase = (index + offset) // period * a
    inner = slice(int(changes[0]), int(changes[-1]) + 2)
    b = int((values - staircase)[inner].mode().values)
    f = x.plus(x.times(x.floordiv(x.plus(i, offset), period), a), b)
    yield f
    ends = {int(values[0]), int(values[-1])}
    lo, hi = min(ends), max(ends)
    for clamped in (x.clamp(f, lo, None), x.clamp(f, None, hi), x.clamp(f, lo, hi)):
        if clamped is not f:
            yield clamped


def _sawtooth(t: Tensor, i: Expr) -> Iterator[Expr]:
    """``a * (i % B) + b``."""
    again = (t[1:] == t[0]).nonzero().flatten()
    if len(again) and int(again[0]) > 0:
        yield x.plus(x.times(x.mod(i, int(again[0]) + 1), int(t[1] - t[0])), int(t[0]))


# -- evaluation
class _Grid(TensorEvaluator):
    """Evaluates over a rectangle of coordinates: `spans` gives each axis a first and a last index."""

    def __init__(self, axes: Sequence[Expr], spans: Sequence[tuple[int, int]]) -> None:
        super().__init__([x.as_var(a) for a in axes], [], _none, _none, _none, torch.device("cpu"))  # type: ignore[misc]
        self.spans = spans

    def _var(self, e: Expr) -> Any:
        k = self.axes.index(e)
        view = [1] * len(self.axes)
        view[k] = -1
        return torch.arange(*self.spans[k]).view(view)

    def _const(self, e: Expr) -> Any:
        return torch.tensor(e.args[0], dtype=torch.float64)

    def _if_real(self, e: Expr) -> Any:
        return torch.where(*map(self, e.args))

    def _float(self, e: Expr) -> Any:
        return torch.as_tensor(self(e.args[0]), dtype=torch.float64)


def _none(name: str) -> Any:
    raise KeyError(name)


def _on(e: Expr, axes: Sequence[Expr], rows: int) -> Tensor:
    """A function of one coordinate (or none) at all of its indices."""
    return torch.as_tensor(_Grid(axes, [(0, rows)] * len(axes))(e)).expand(rows)


def _with_exceptions(guess: Expr, t: Tensor, axes: Sequence[Expr]) -> Expr | None:
    """`guess` with the elements at which the tensor differs as cases; None if there are too many."""
    found = _exceptions(guess, t, axes)
    if found is None:
        return None
    for at in found:
        here = x.conj(*(x.equal(a, x.integer(c)) for a, c in zip(axes, at)))
        guess = x.select(here, literal(t[tuple(at)].item(), t.dtype), guess)
    return guess


def _exceptions(guess: Expr, t: Tensor, axes: Sequence[Expr]) -> list[list[int]] | None:
    """Where the tensor is not what the expression says, looking at every element; None beyond `EXCEPTIONS`.

    NaN is never what an expression says.
    """
    if t.dim() == 0:
        value = _Grid((), ())(guess)
        return [] if _equal(torch.as_tensor(value), t).all() else None
    rows = max(1, _CHUNK // max(1, math.prod(t.shape[1:])))
    found: list[list[int]] = []
    for start in range(0, t.shape[0], rows):
        part = t[start : start + rows]
        spans = [(start, start + len(part)), *((0, s) for s in t.shape[1:])]
        value = torch.as_tensor(_Grid(axes, spans)(guess))
        wrong = (~_equal(value, part)).nonzero()
        if len(found) + len(wrong) > EXCEPTIONS:
            return None
        found += [[r + start, *rest] for r, *rest in wrong.tolist()]
    return found


def _equal(value: Tensor, t: Tensor) -> Tensor:
    if t.is_floating_point():
        return t.double() == value
    return t == value if t.dtype == torch.bool else t.long() == value
