"""Expressions evaluated: at one point in Python integers, or everywhere at once as torch operations.

`at_point` serves fitting (what window would this mask be?). `TensorEvaluator` turns an integer or truth expression
into a tensor over named axes. It only calls torch functions, so that it runs alike on tensors (the tests of reading rules)
and on graph proxies (the rewrite emits a list of selected blocks with it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import expr as x
from .expr import Expr


class DataDependent(Exception):
    """The expression needs run-time data: `expression` is the part that does."""

    def __init__(self, expression: Expr) -> None:
        super().__init__(f"depends on run-time values: {x.show(expression)[:120]}")
        self.expression = expression


def at_point(e: Expr, values: Mapping[Expr, int], sizes: Mapping[str, int]) -> int | bool:
    """The value of an integer or truth expression at one point.

    Args:
        e: The expression.
        values: A value for every free variable.
        sizes: A value for every size symbol.

    Raises:
        DataDependent: If the value is not determined by coordinates.
    """
    op, a = e.op, e.args

    def go(t: Expr) -> Any:
        return at_point(t, values, sizes)

    if op == "sum":
        return a[0] + sum(k * go(t) for t, k in a[1])
    if op == "var":
        return values[e]
    if op == "size":
        return sizes[a[0]]
    if op == "prod":
        r = 1
        for t in a[0]:
            r *= go(t)
        return r
    if op == "div":
        return go(a[0]) // go(a[1])
    if op == "mod":
        return go(a[0]) % go(a[1])
    if op == "if_int":
        return go(a[1]) if go(a[0]) else go(a[2])
    if op in ("true", "false"):
        return op == "true"
    if op == "not":
        return not go(a[0])
    if op == "and":
        return all(go(t) for t in a)
    if op == "or":
        return any(go(t) for t in a)
    if op == "ge":
        return go(a[0]) >= 0
    if op == "eq":
        return go(a[0]) == 0
    raise DataDependent(e)


class TensorEvaluator:
    """Evaluates integer and truth expressions over a grid of axes.

    Args:
        axes: The variables of the grid, in order; every result broadcasts to one dimension per axis.
        extents: The length of each axis: an int, a SymInt or a proxy of one.
        tensor: Maps the name of a node to its tensor (or proxy).
        shape: Maps the name of a node to its sizes as integer expressions.
        size: Maps the name of a size symbol to its value.
        device: Where new tensors live.
        create: Calls a factory function; the rewrite passes one that puts the call into its graph.
    """

    def __init__(
        self,
        axes: Sequence[Expr],
        extents: Sequence[Any],
        tensor: Callable[[str], Any],
        shape: Callable[[str], Sequence[Expr]],
        size: Callable[[str], Any],
        device: torch.device,
        create: Callable[..., Any] = lambda factory, *args, **kwargs: factory(*args, **kwargs),
    ) -> None:
        self.axes, self.extents, self.device = list(axes), list(extents), device
        self._tensor, self._shape, self._size_of = tensor, shape, size
        self._create = create
        self._memo: dict[Expr, Any] = {}

    def __call__(self, e: Expr) -> Any:
        r = self._memo.get(e)
        if r is None:
            r = self._memo[e] = getattr(self, "_" + e.op)(e)
        return r

    def scalar(self, e: Expr) -> Any:
        """A size expression as an int, a SymInt or a proxy, never a tensor."""
        op, a = e.op, e.args
        if op == "sum":
            r = a[0]
            for t, k in a[1]:
                r = r + k * self.scalar(t)
            return r
        if op == "size":
            return self._size_of(a[0])
        if op == "prod":
            r = 1
            for t in a[0]:
                r = r * self.scalar(t)
            return r
        if op == "div":
            return self.scalar(a[0]) // self.scalar(a[1])
        if op == "mod":
            return self.scalar(a[0]) % self.scalar(a[1])
        raise DataDependent(e)

    def _sum(self, e: Expr) -> Any:
        r = e.args[0]
        for t, k in e.args[1]:
            r = r + k * self(t) if k != 1 else self(t) + r
        return r

    def _var(self, e: Expr) -> Any:
        k = self.axes.index(e)
        view = [1] * len(self.axes)
        view[k] = -1
        return self._create(torch.arange, self.extents[k], device=self.device).view(view)

    def _size(self, e: Expr) -> Any:
        return self._size_of(e.args[0])

    def _prod(self, e: Expr) -> Any:
        r = 1
        for t in e.args[0]:
            r = r * self(t)
        return r

    def _div(self, e: Expr) -> Any:
        return self(e.args[0]) // self._divisor(e)

    def _mod(self, e: Expr) -> Any:
        return self(e.args[0]) % self._divisor(e)

    def _divisor(self, e: Expr) -> Any:
        c = x.constant(e.args[1])
        return c if c is not None else self.scalar(e.args[1])

    def _if_int(self, e: Expr) -> Any:
        return torch.where(*map(self, e.args))

    def _true(self, e: Expr) -> Any:
        return self._create(torch.ones, [1] * len(self.axes), dtype=torch.bool, device=self.device)

    def _false(self, e: Expr) -> Any:
        return self._create(torch.zeros, [1] * len(self.axes), dtype=torch.bool, device=self.device)

    def _not(self, e: Expr) -> Any:
        return ~self(e.args[0])

    def _and(self, e: Expr) -> Any:
        r = self(e.args[0])
        for t in e.args[1:]:
            r = r & self(t)
        return r

    def _or(self, e: Expr) -> Any:
        r = self(e.args[0])
        for t in e.args[1:]:
            r = r | self(t)
        return r

    def _ge(self, e: Expr) -> Any:
        return self(e.args[0]) >= 0

    def _eq(self, e: Expr) -> Any:
        return self(e.args[0]) == 0

    def _exists(self, e: Expr) -> Any:
        v, body = e.args
        inner = TensorEvaluator(
            [*self.axes, v], [*self.extents, self.scalar(v.args[1])],
            self._tensor, self._shape, self._size_of, self.device, self._create,
        )
        return inner(body).any(-1)

    def _apply(self, e: Expr) -> Any:
        return self.element(*e.args)

    _predicate = _load = _softmax = _apply

    def _compare(self, e: Expr) -> Any:
        op, a, b = e.args
        p = a.args[0] if a.op == "const" else self(a)
        q = b.args[0] if b.op == "const" else self(b)
        if a.op == "const":
            return q == p if op == "eq" else q < p if op == "gt" else q <= p
        return p == q if op == "eq" else p > q if op == "gt" else p >= q

    def _float(self, e: Expr) -> Any:
        return self(e.args[0])

    def _scaled(self, e: Expr) -> Any:
        return self(e.args[1]) * e.args[0]

    def element(self, name: str, coords: Sequence[Expr]) -> Any:
        """``tensor(name)[coords]`` over the grid: a permuted view where the coordinates are axes, else a gather."""
        t = self._tensor(name)
        plain = [x.as_var(c) for c in coords]
        fixed = [x.constant(c) == 0 for c in coords]
        kept = [v for v in plain if v is not None]
        if all(v is not None or f for v, f in zip(plain, fixed)) and len(set(kept)) == len(kept):
            if all(v is None or v.args[1] is s for v, s in zip(plain, self._shape(name))):
                return self._view(t, plain)
        index = []
        for c, s in zip(coords, self._shape(name)):
            v = self(c)
            safe = x.constant(c) is not None or c.lo >= 0 and x.within(c, s)
            index.append(v if safe else v.clamp(0, self.scalar(s) - 1))
        return t[tuple(index)]

    def _view(self, t: Any, plain: Sequence[Expr | None]) -> Any:
        present = [a for a in self.axes if a in plain]
        order = [k for k, v in enumerate(plain) if v is None] + [plain.index(a) for a in present]
        t = t.permute(order)
        for _ in range(sum(v is None for v in plain)):
            t = t.select(0, 0)
        for k, a in enumerate(self.axes):
            if a not in plain:
                t = t.unsqueeze(k)
        return t
