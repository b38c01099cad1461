"""Moves: where an element comes from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from .. import expr as x
from ..expr import Expr
from ..nodes import argument, axis, is_tensor, op_name, rank
from ..reader import Coords, Move, Reader, moves


def at(coords: Coords, d: int, e: Expr) -> Coords:
    """`coords` with entry `d` replaced."""
    return coords[:d] + (e,) + coords[d + 1 :]


@moves("alias", "clone", "contiguous", "lift_fresh_copy", "lift_fresh", "detach", "_to_copy", "to", "positive", "type_as")
def _same(r: Reader, n: Node, c: Coords) -> Move | None:
    return Move(n.args[0], c)


@moves("dropout", "feature_dropout")
def _dropout(r: Reader, n: Node, c: Coords) -> Move | None:
    p, training = argument(n, 1, "p", 0.5), argument(n, 2, "train", False)
    return Move(n.args[0], c) if p == 0 or training is False else None


@moves("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "squeeze", "unsqueeze", "view_as")
def _reshape(r: Reader, n: Node, c: Coords) -> Move | None:
    source = n.args[0]
    return Move(source, regroup(r, r.shape(n), c, r.shape(source)))


def regroup(r: Reader, a: Sequence[Expr], c: Sequence[Expr], b: Sequence[Expr]) -> Coords:
    """Coordinates in shape `a` as coordinates in shape `b`.

    Split at the finest places where the prefix products of both shapes agree, so that untouched dimensions keep their
    coordinate. Which side to advance is decided on size hints; the result does not depend on it.
    """
    out: list[Expr] = []
    i = j = 0
    while i < len(a) or j < len(b):
        i0, j0, pa, pb = i, j, x.ONE, x.ONE
        if i < len(a):
            pa, i = a[i], i + 1
        if j < len(b):
            pb, j = b[j], j + 1
        while pa is not pb and (i < len(a) or j < len(b)):
            if i < len(a) and (r.sizes.hint(pa) < r.sizes.hint(pb) or j >= len(b)):
                pa, i = x.times(pa, a[i]), i + 1
            elif j < len(b) and (r.sizes.hint(pb) < r.sizes.hint(pa) or i >= len(a)):
                pb, j = x.times(pb, b[j]), j + 1
            else:  # equal for this hint but not in form: advance both
                pa, i = x.times(pa, a[i]), i + 1
                pb, j = x.times(pb, b[j]), j + 1
        if (i - i0, j - j0) == (1, 1):
            out.append(x.ZERO if b[j0] is x.ONE else c[i0])
            continue
        flat = x.ZERO
        for k in range(i0, i):
            if a[k] is not x.ONE:
                flat = x.plus(x.times(flat, a[k]), c[k])
        out += unflatten(flat, b[j0:j])
    return tuple(out)


def unflatten(flat: Expr, sizes: Sequence[Expr]) -> list[Expr]:
    """A row-major offset as coordinates."""
    lead = next((k for k, s in enumerate(sizes) if s is not x.ONE), None)
    out: list[Expr] = []
    for k in reversed(range(len(sizes))):
        if sizes[k] is x.ONE:
            out.append(x.ZERO)
        elif k == lead:
            out.append(flat)
        else:
            out.append(x.mod(flat, sizes[k]))
            flat = x.floordiv(flat, sizes[k])
    return out[::-1]


@moves("permute")
def _permute(r: Reader, n: Node, c: Coords) -> Move | None:
    source: list[Expr] = [x.ZERO] * len(c)
    for k, p in enumerate(n.args[1]):
        source[axis(p, len(c))] = c[k]
    return Move(n.args[0], tuple(source))


@moves("transpose", "swapaxes", "swapdims")
def _transpose(r: Reader, n: Node, c: Coords) -> Move | None:
    i, j = axis(n.args[1], len(c)), axis(n.args[2], len(c))
    q = list(c)
    q[i], q[j] = q[j], q[i]
    return Move(n.args[0], tuple(q))


@moves("t", "mT", "numpy_T", "adjoint")
def _matrix_transpose(r: Reader, n: Node, c: Coords) -> Move | None:
    if op_name(n) == "numpy_T":
        return Move(n.args[0], c[::-1])
    return Move(n.args[0], (*c[:-2], c[-1], c[-2])) if len(c) >= 2 else Move(n.args[0], c)


@moves("movedim", "moveaxis")
def _movedim(r: Reader, n: Node, c: Coords) -> Move | None:
    def dims(v: int | Sequence[int]) -> list[int]:
        return [axis(d, len(c)) for d in (v if isinstance(v, (list, tuple)) else [v])]

    order: list[int | None] = [None] * len(c)
    src, dst = dims(n.args[1]), dims(n.args[2])
    for s, d in zip(src, dst):
        order[d] = s
    rest = iter(k for k in range(len(c)) if k not in src)
    q: list[Expr] = [x.ZERO] * len(c)
    for k, o in enumerate(order):
        q[next(rest) if o is None else o] = c[k]
    return Move(n.args[0], tuple(q))


@moves("expand", "broadcast_to", "expand_as")
def _expand(r: Reader, n: Node, c: Coords) -> Move | None:
    return Move(n.args[0], r.align(n.args[0], c))


@moves("select")
def _select(r: Reader, n: Node, c: Coords) -> Move | None:
    source = n.args[0]
    d, i = axis(n.args[1], rank(source)), r.scalar(n.args[2])
    if i is None:
        return None
    if i.lo < 0:
        if x.constant(i) is None:
            return None
        i = x.plus(i, r.shape(source)[d])
    return Move(source, (*c[:d], i, *c[d:]))


def slice_start(r: Reader, start: object, size: Expr) -> Expr | None:
    """Where a slice begins: a negative start counts from the end, and none is before the beginning."""
    s = x.ZERO if start is None else r.scalar(start)
    if s is None or s.lo >= 0:
        return s
    if x.constant(s) is None:
        return None
    s = x.plus(s, size)
    if s.lo >= 0:
        return s
    return x.ZERO if x.constant(s) is not None else None


@moves("slice")
def _slice(r: Reader, n: Node, c: Coords) -> Move | None:
    source = n.args[0]
    d, step = axis(argument(n, 1, "dim", 0), rank(source)), argument(n, 4, "step", 1)
    s = slice_start(r, argument(n, 2, "start"), r.shape(source)[d])
    return Move(source, at(c, d, x.plus(x.times(c[d], step), s))) if s is not None and isinstance(step, int) else None


@moves("narrow")
def _narrow(r: Reader, n: Node, c: Coords) -> Move | None:
    s = r.scalar(n.args[2])
    d = axis(n.args[1], rank(n))
    return Move(n.args[0], at(c, d, x.plus(c[d], s))) if s is not None and s.lo >= 0 else None


@moves("getitem")
def _getitem(r: Reader, n: Node, c: Coords) -> Move | None:
    producer, k = n.args
    name = op_name(producer)
    if name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        source = producer.args[0]
        d = axis(argument(producer, 2, "dim", 0), rank(source))
        offset = x.ZERO
        for piece in producer.meta["val"][:k]:
            offset = x.plus(offset, r.sizes.of(piece.shape[d]))
        return Move(source, at(c, d, x.plus(c[d], offset)))
    if name == "unbind":
        source = producer.args[0]
        d = axis(argument(producer, 1, "dim", 0), rank(source))
        return Move(source, (*c[:d], x.integer(k), *c[d:]))
    if name in ("topk", "sort") and k == 0:  # the value stands where the index says
        from .membership import top_index

        source, d = producer.args[0], r_axis(producer)
        return Move(source, at(c, d, top_index(r, producer, c)))
    return None


def r_axis(producer: Node) -> int:
    """The axis of a top-k, a sort or an argsort."""
    position = 2 if op_name(producer) == "topk" else 1
    return axis(argument(producer, position, "dim", -1), rank(producer.args[0]))


@moves("pad", "constant_pad_nd")
def _pad(r: Reader, n: Node, c: Coords) -> Move | None:
    source, pads = n.args[0], n.args[1]
    if op_name(n) == "pad":
        if argument(n, 2, "mode", "constant") != "constant":
            return None
        value = argument(n, 3, "value")
    else:
        value = argument(n, 2, "value", 0)
    guard = x.TRUE
    for k in range(len(pads) // 2):
        before, after = r.scalar(pads[2 * k]), r.scalar(pads[2 * k + 1])
        if before is None or after is None:
            return None
        d = rank(source) - 1 - k
        c = at(c, d, x.minus(c[d], before))
        if before is not x.ZERO:
            guard = x.conj(guard, x.at_least(c[d], x.ZERO))
        if after.hi > 0:
            guard = x.conj(guard, x.less(c[d], r.shape(source)[d]))
    return Move(source, c, guard, value or 0)


@moves("unfold")
def _unfold(r: Reader, n: Node, c: Coords) -> Move | None:
    source, d, _, step = n.args
    d = axis(d, rank(source))
    *rest, inside = c
    return Move(source, at(tuple(rest), d, x.plus(x.times(rest[d], step), inside)))


@moves("repeat", "tile")
def _repeat(r: Reader, n: Node, c: Coords) -> Move | None:
    s = r.shape(n.args[0])
    return Move(n.args[0], tuple(x.mod(q, k) for q, k in zip(c[len(c) - len(s) :], s)))


@moves("repeat_interleave")
def _repeat_interleave(r: Reader, n: Node, c: Coords) -> Move | None:
    source, k, d = n.args[0], argument(n, 1, "repeats"), argument(n, 2, "dim")
    if not isinstance(k, int) or k < 1:
        return None
    if d is None:
        if rank(source) != 1:
            return None
        d = 0
    d = axis(d, len(c))
    return Move(source, at(c, d, x.floordiv(c[d], k)))


@moves("flip")
def _flip(r: Reader, n: Node, c: Coords) -> Move | None:
    for d in n.args[1]:
        d = axis(d, len(c))
        c = at(c, d, x.minus(x.minus(r.shape(n)[d], 1), c[d]))
    return Move(n.args[0], c)


@moves("roll")
def _roll(r: Reader, n: Node, c: Coords) -> Move | None:
    shifts, dims = n.args[1], argument(n, 2, "dims", [])
    if not dims:
        return None
    for k, d in zip(shifts, dims):
        shift = r.scalar(k)
        if shift is None:
            return None
        d = axis(d, len(c))
        c = at(c, d, x.mod(x.minus(c[d], shift), r.shape(n)[d]))
    return Move(n.args[0], c)


def wrap(e: Expr, size: Expr) -> Expr:
    """An index as indexing takes it: negative entries count from the end."""
    return e if e.lo >= 0 else x.select(x.at_least(e, x.ZERO), e, x.plus(e, size))


@moves("gather")
def _gather(r: Reader, n: Node, c: Coords) -> Move | None:
    source, d, index = n.args[:3]
    d = axis(d, rank(source))
    return Move(source, at(c, d, r.read(index, c)))


@moves("take_along_dim")
def _take_along_dim(r: Reader, n: Node, c: Coords) -> Move | None:
    source, index, d = n.args[0], n.args[1], argument(n, 2, "dim")
    if d is None:
        return None
    d = axis(d, rank(source))
    return Move(source, at(r.align(source, c), d, wrap(r.read(index, r.align(index, c)), r.shape(source)[d])))


@moves("index_select")
def _index_select(r: Reader, n: Node, c: Coords) -> Move | None:
    source, d, index = n.args
    d = axis(d, len(c))
    return Move(source, at(c, d, r.read(index, (c[d],) if rank(index) else ())))


@moves("embedding")
def _embedding(r: Reader, n: Node, c: Coords) -> Move | None:
    if argument(n, 2, "padding_idx", -1) != -1 or argument(n, 3, "scale_grad_by_freq", False):
        return None  # rows with another gradient
    return Move(n.args[0], (r.read(n.args[1], c[:-1]), c[-1]))


@moves("index")
def _index(r: Reader, n: Node, c: Coords) -> Move | None:
    source = n.args[0]
    indices = list(n.args[1]) + [None] * (rank(source) - len(n.args[1]))
    used = [k for k, i in enumerate(indices) if i is not None]
    if any(indices[k].meta["val"].dtype == torch.bool for k in used):
        return None
    width = max(rank(indices[k]) for k in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    first = used[0] if adjacent else 0  # separated index tensors put their dimensions in front
    inner, rest = c[first : first + width], iter(c[:first] + c[first + width :])
    q = [
        next(rest) if i is None else wrap(r.read(i, r.align(i, inner)), r.shape(source)[k])
        for k, i in enumerate(indices)
    ]
    return Move(source, tuple(q))


@moves("tril", "triu")
def _triangle(r: Reader, n: Node, c: Coords) -> Move | None:
    k = r.scalar(argument(n, 1, "diagonal", 0))
    if k is None:
        return None
    i, j = x.plus(c[-2], k), c[-1]
    return Move(n.args[0], c, x.at_least(i, j) if op_name(n) == "tril" else x.at_least(j, i), 0)


@moves("cat")
def _cat_of_one(r: Reader, n: Node, c: Coords) -> Move | None:
    """Of one tensor, as einops.pack writes it, or of one tensor several times, which repeats it; empty parts are dropped."""
    parts = nonempty(r, n.args[0])
    if len(parts) == 1:
        return Move(parts[0], c)
    if len(set(parts)) != 1:
        return None
    d = axis(argument(n, 1, "dim", 0), rank(n))
    return Move(parts[0], at(c, d, x.mod(c[d], r.shape(parts[0])[d])))


def nonempty(r: Reader, tensors: Sequence[Node]) -> list[Node]:
    """The parts of a concatenation that are not statically empty."""
    return [t for t in tensors if is_tensor(t) and not any(s is x.ZERO for s in r.shape(t))]


def parts_of(r: Reader, n: Node, c: Coords) -> list[tuple[Expr, Node, Coords]]:
    """The parts of a concatenation: when the element lies before the end of the part, the part, and where in it."""
    d = axis(argument(n, 1, "dim", 0), rank(n))
    out, start = [], x.ZERO
    for t in nonempty(r, n.args[0]):
        end = x.plus(start, r.shape(t)[d])
        out.append((x.less(c[d], end), t, at(c, d, x.minus(c[d], start))))
        start = end
    return out
