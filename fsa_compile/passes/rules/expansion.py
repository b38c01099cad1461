"""From blocks to tokens: `kron` with ones, and nearest-neighbour `interpolate`."""

from __future__ import annotations

from torch.fx import Node

from .. import expr as x
from ..expr import Expr
from ..nodes import argument, is_real, rank
from ..reader import Coords, Mode, Move, Reader, moves, values


@values("kron")
def _kron(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """``a[c // size of b] * b[c % size of b]``, where one of both is a constant."""
    a, b = n.args[:2]
    if not is_real(n) or rank(a) < rank(b):
        return None
    sizes = (*[x.ONE] * (rank(a) - rank(b)), *r.shape(b))
    outer = r.coerce(n, r.read(a, tuple(x.floordiv(q, s) for q, s in zip(c, sizes)), m))
    inner = r.coerce(n, r.read(b, tuple(x.mod(q, s) for q, s in zip(c, sizes))[rank(a) - rank(b) :], m))
    pairs = [(p, q) for _, p in x.cases(outer) for _, q in x.cases(inner)]
    if any(x.real(1) not in (p, q) and not p.op == q.op == "const" for p, q in pairs):
        return None

    def product(p: Expr, q: Expr) -> Expr:
        return q if p is x.real(1) else p if q is x.real(1) else x.real(p.args[0] * q.args[0])

    return x.map_cases(outer, lambda p: x.map_cases(inner, lambda q: product(p, q)))


@moves("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _upsample_nearest(r: Reader, n: Node, c: Coords) -> Move | None:
    """Element ``c // factor``. Torch multiplies `c` with 1 / factor as float32 holds it, which is exact for powers of two."""
    if n.target._overloadname != "vec":  # type: ignore[union-attr]
        return None
    source, factors = n.args[0], argument(n, 2, "scale_factors")
    q = list(c)
    for d in range(2, len(c)):
        before, after = (x.constant(r.shape(t)[d]) for t in (source, n))
        if not before or not after or after % before:
            return None
        factor = after // before
        if factor & (factor - 1) or factors is not None and factors[d - 2] != factor:
            return None
        q[d] = x.floordiv(c[d], factor)
    return Move(source, tuple(q))
