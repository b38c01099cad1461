"""How the dimensions of a node hold those of a canonical tensor: permuted, folded together, or missing.

The ops take ``(b, h, n, d)``. A model may hold its queries as ``(b, n, h, d)``, ``(b * h, n, d)`` or ``(n, h, d)``.
`Layout.to_canonical` and `Layout.from_canonical` turn one into the other with views.
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
    a dimension of size one that holds nothing.
    """

    dims: tuple[tuple[int, ...], ...]
    axes: int = 4

    def to_canonical(self, t: Any, sizes: Sequence[Any]) -> Any:
        """View `t` as the canonical tensor of those sizes."""
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
        return t

    def _split(self, sizes: Sequence[Any]) -> list[Any]:
        return [s for d in self.dims for s in ([sizes[a] for a in d] if d else [1])]

    def from_canonical(self, t: Any, shape: Sequence[Any]) -> Any:
        """The canonical tensor as the node of that shape held it."""
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
    coords: Sequence[Expr], shape: Sequence[Expr], targets: Sequence[Expr], sizes: Sequence[Expr]
) -> Layout | None:
    """The layout in which `coords` are the canonical coordinates `targets`, or None.

    The node must hold the canonical tensor and nothing else: a slice of it is no layout.

    Args:
        coords: Where the canonical element ``targets`` stands in the node, one expression per dimension.
        shape: The sizes of the node.
        targets: The canonical coordinates.
        sizes: The canonical sizes.
    """
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
        pair = next(
            (
                (k, l)
                for k, l in itertools.permutations(sorted(left), 2)
                if x.times(sizes[k], sizes[l]) is extent
                and x.floordiv(c, sizes[l]) is targets[k]
                and x.mod(c, sizes[l]) is targets[l]
            ),
            None,
        )
        if pair is None:
            return None
        dims.append(pair)
        left -= set(pair)
    if any(sizes[k] is not x.ONE for k in left):
        return None
    return Layout(tuple(dims), len(targets))
