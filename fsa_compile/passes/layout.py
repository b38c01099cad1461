"""How the dimensions of a node hold those of a canonical tensor: permuted, folded together, or missing.

The ops take ``(b, h, n, d)``. A model may hold its queries as ``(b, n, h, d)``, ``(b * h, n, d)`` or ``(n, h, d)``, or with the
query heads as two dimensions in either order, or the queries as chunks. `Layout.to_canonical` and `Layout.from_canonical` turn one
into the other with views.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import expr as x
from .expr import Expr


@dataclass(frozen=True)
class Layout:
    """For each dimension of a node, the canonical axes it holds, major first.

    ``((0,), (2,), (1,), (3,))`` is BNHD; ``((0, 1), (2,), (3,))`` has the heads folded into the batch; an empty entry is
    a dimension of size one that holds nothing. `splits` names axes that are counted as two, each with the size of the minor one:
    ``((1, g),)`` makes the axes ``(b, hkv, g, n, d)``, where the canonical heads are ``hkv * g + group``, and ``((2, c),)`` makes
    them ``(b, h, chunks, c, d)``.
    """

    dims: tuple[tuple[int, ...], ...]
    splits: tuple[tuple[int, int], ...] = ()

    @property
    def axes(self) -> int:
        """How many canonical axes `dims` counts."""
        return 4 + len(self.splits)

    def _taken_apart(self, sizes: Sequence[Any]) -> list[Any]:
        minor = dict(self.splits)
        return [s for a, size in enumerate(sizes) for s in ((size // minor[a], minor[a]) if a in minor else (size,))]

    def to_canonical(self, t: Any, sizes: Sequence[Any]) -> Any:
        """View `t` as the canonical tensor of the sizes ``(b, h, n, d)``."""
        canonical, sizes = sizes, self._taken_apart(sizes)
        if any(len(d) > 1 for d in self.dims):
            t = t.reshape([sizes[a] for d in self.dims for a in d] if all(self.dims) else self._split(sizes))
        flat = [a for d in self.dims for a in (d or (None,))]
        order = [flat.index(a) for a in range(self.axes) if a in flat]
        spare = [k for k, a in enumerate(flat) if a is None]
        if spare + order != list(range(len(flat))):
            t = t.permute(spare + order)
        for _ in spare:
            t = t.select(0, 0)
        for a in range(self.axes):
            if a not in flat:
                t = t.unsqueeze(a)
        return t.reshape(list(canonical)) if self.splits else t

    def _split(self, sizes: Sequence[Any]) -> list[Any]:
        return [s for d in self.dims for s in ([sizes[a] for a in d] if d else [1])]

    def from_canonical(self, t: Any, sizes: Sequence[Any], shape: Sequence[Any]) -> Any:
        """The canonical tensor of the sizes ``(b, h, n, d)`` as the node of that shape held it."""
        if self.splits:
            t = t.reshape(self._taken_apart(sizes))
        flat = [a for d in self.dims for a in d]
        missing = [a for a in range(self.axes) if a not in flat]
        if flat + missing != list(range(self.axes)):
            t = t.permute(flat + missing)
        for _ in missing:
            t = t.select(-1, 0)
        if len(shape) != len(self.dims) or any(len(d) != 1 for d in self.dims):
            t = t.reshape(list(shape))
        return t


def find_layout(
    coords: Sequence[Expr],
    shape: Sequence[Expr],
    targets: Sequence[Expr],
    sizes: Sequence[Expr],
    splits: tuple[tuple[int, int], ...] = (),
) -> Layout | None:
    """The layout in which `coords` are the canonical coordinates `targets`, or None.

    The node must hold the canonical tensor and nothing else: a slice of it is no layout.

    Args:
        coords: Where the canonical element ``targets`` stands in the node, one expression per dimension.
        shape: The sizes of the node.
        targets: The canonical coordinates.
        sizes: The canonical sizes.
        splits: The axes that count as two, with the size of the minor one, see `Layout`.
    """
    minor = dict(splits)
    if any(x.mod(sizes[a], m) is not x.ZERO for a, m in splits):
        return None
    targets = [e for a, t in enumerate(targets) for e in ((x.floordiv(t, minor[a]), x.mod(t, minor[a])) if a in minor else (t,))]
    sizes = [e for a, s in enumerate(sizes) for e in ((x.floordiv(s, minor[a]), x.integer(minor[a])) if a in minor else (s,))]
    left = {k for k, t in enumerate(targets)}
    dims: list[tuple[int, ...]] = []
    for c, extent in zip(coords, shape):
        found = next((k for k in sorted(left) if targets[k] is c and targets[k] is not x.ZERO), None)
        if found is not None:
            if sizes[found] is not extent:
                return None
            dims.append((found,))
            left.discard(found)
            continue
        if c is x.ZERO:
            if extent is not x.ONE:
                return None
            dims.append(())
            continue
        # An axis that the coordinate does not depend on is none of its axes; one of size one adds nothing to it.
        inside = [k for k in sorted(left) if targets[k] is not x.ZERO and targets[k].free <= c.free]
        held = next(
            (
                order
                for count in (2, 3)
                for order in itertools.permutations(inside, count)
                if _product(order, sizes) is extent and _row_major(order, targets, sizes) is c
            ),
            None,
        )
        if held is None:
            return None
        dims.append(held)
        left -= set(held)
    if any(sizes[k] is not x.ONE for k in left):
        return None
    return Layout(tuple(dims), splits)


def _row_major(order: Sequence[int], targets: Sequence[Expr], sizes: Sequence[Expr]) -> Expr:
    """The coordinate of a dimension that holds these axes, major first."""
    out = x.ZERO
    for k in order:
        out = x.plus(x.times(out, sizes[k]), targets[k])
    return out


def _product(order: Sequence[int], sizes: Sequence[Expr]) -> Expr:
    out = x.ONE
    for k in order:
        out = x.times(out, sizes[k])
    return out
