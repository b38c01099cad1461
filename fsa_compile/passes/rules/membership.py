"""Values: sets of blocks. Scatter, index_put, one-hot and comparison with a list all say ``exists s: list[s] == e``."""

from __future__ import annotations

import torch
from torch.fx import Node

from .. import expr as x
from ..expr import Expr
from ..nodes import argument, axis, dtype, is_tensor, literal, op_name, rank
from ..reader import Coords, Mode, Reader, values
from ..smt import solve
from .index import at, parts_of, r_axis, slice_start, wrap
from .pointwise import converted
from .reduction import largest


def top_index(r: Reader, producer: Node, c: Coords) -> Expr:
    """Element `c` of the indices of a top-k, a sort or an argsort; the node is remembered, `facts.py` knows what holds of it."""
    d = r_axis(producer)
    r.tops[producer.name] = (producer, d)
    return x.apply(producer.name, c, 0, r.shape(producer.args[0])[d].hi - 1)


@values("getitem")
def _indices(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    producer, k = n.args
    if op_name(producer) == "max" and k == 0:
        return largest(r, producer, c, m, n)
    return top_index(r, producer, c) if op_name(producer) in ("topk", "sort") and k == 1 else None


@values("argsort")
def _argsort(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return top_index(r, n, c)


@values("scatter")
def _scatter(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if len(n.args) != 4 or n.kwargs.get("reduce") is not None:
        return None
    source, d, index, value = n.args
    d = axis(d, rank(source))
    v = x.var(f"{n.name}.slot", r.shape(index)[d])
    q = at(c, d, v)
    if is_tensor(value):
        new = r.read(value, q, m)
        if x.as_var(v) in new.free:
            return None  # which of several writers wins is not defined
    else:
        new = literal(value, dtype(n))
    return x.select(_written(r, n, c, d, v), new, r.read(source, c, m))


@values("scatter_add")
def _scatter_add(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Ones added to zeros: how often an element is listed. Zero iff it is not, at least one otherwise, how many is not needed."""
    source, d, index, added = n.args
    d = axis(d, rank(source))
    v = x.var(f"{n.name}.slot", r.shape(index)[d])
    base = r.read(source, c, m)
    if base not in (x.ZERO, x.real(0)) or r.read(added, at(c, d, v), m) not in (x.ONE, x.real(1)):
        return None
    count = x.apply(n.name, c, 1, r.shape(index)[d].hi)
    return x.select(_written(r, n, c, d, v), r.coerce(n, count), base)


def _written(r: Reader, n: Node, c: Coords, d: int, slot: Expr) -> Expr:
    """Whether the scatter `n` along axis `d` writes element `c`, from some `slot`."""
    source, index, q = n.args[0], n.args[2], at(c, d, slot)
    sizes = enumerate(zip(r.shape(index), r.shape(source)))
    covered = [x.less(q[k], s) for k, (s, full) in sizes if k != d and s is not full]
    return _listed(slot, x.conj(*covered), r.read(index, q), c[d])


def _listed(slot: Expr, given: Expr, entry: Expr, value: Expr) -> Expr:
    """``exists slot: given and entry == value``. Entries ``B * list[slot // B] + slot % B`` are the positions in listed blocks:
    ``exists s: list[s] == value // B``."""
    v = x.as_var(slot)
    for t in x.walk(entry) if v is not None and v not in given.free else ():
        size = x.constant(t.args[1]) if t.op == "div" and t.args[0] is slot else None
        if size is None or size < 2 or x.mod(v.args[1], size) is not x.ZERO:  # type: ignore[union-attr]
            continue
        block = x.var(f"{v.args[0]}.block", x.floordiv(v.args[1], size))  # type: ignore[union-attr]
        offset = x.var(f"{v.args[0]}.offset", size)  # type: ignore[union-attr]
        start = x.minus(x.substitute(entry, {v: x.plus(x.times(block, size), offset)}), offset)
        if x.as_var(offset) not in start.free and x.mod(start, size) is x.ZERO:
            return x.conj(given, x.exists(block, x.equal(x.floordiv(start, size), x.floordiv(value, size))))
    return x.exists(slot, x.conj(given, x.equal(entry, value)))


@values("slice_scatter")
def _slice_scatter(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """``t[start:end:step] = part``."""
    source, part = n.args[:2]
    d, step = axis(argument(n, 2, "dim", 0), rank(source)), argument(n, 5, "step", 1)
    start = slice_start(r, argument(n, 3, "start"), r.shape(source)[d])
    if start is None or not isinstance(step, int):
        return None
    behind = x.minus(c[d], start)
    inside = x.floordiv(behind, step)
    hit = x.conj(x.in_range(inside, r.shape(part)[d]), x.equal(x.mod(behind, step), x.ZERO))
    return x.select(hit, r.coerce(n, r.read(part, at(c, d, inside), m)), r.read(source, c, m))


@values("select_scatter")
def _select_scatter(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """``t[:, k] = part``."""
    source, part, d, k = n.args[:4]
    d = axis(d, rank(source))
    index = slice_start(r, k, r.shape(source)[d])
    if index is None:
        return None
    new = r.coerce(n, r.read(part, c[:d] + c[d + 1 :], m))
    return x.select(x.equal(c[d], index), new, r.read(source, c, m))


@values("copy")
def _copy(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return converted(r, n, n.args[1], c, m) if is_tensor(n.args[1]) else None


@values("one_hot")
def _one_hot(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.select(x.equal(r.read(n.args[0], c[:-1]), c[-1]), x.ONE, x.ZERO)


@values("index_put")
def _index_put(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """``t[i0, i1, ...] = constant``: hit iff some position of the broadcast index has every component equal."""
    source, indices, value = n.args[:3]
    if argument(n, 3, "accumulate", False):
        return None
    given = [(k, i) for k, i in enumerate(indices) if i is not None]
    if any(i.meta["val"].dtype == torch.bool for _, i in given):
        return _masked_assignment(r, n, c, m, given)
    shapes = [r.shape(i) for _, i in given]
    extents = []
    for k in range(-max(map(len, shapes)), 0):
        longer = {s[k] for s in shapes if len(s) >= -k} - {x.ONE}
        if len(longer) > 1:
            return None
        extents.append(longer.pop() if longer else x.ONE)
    slots = tuple(x.var(f"{n.name}.slot{k}", s) if s is not x.ONE else x.ZERO for k, s in enumerate(extents))
    if rank(value) > 0 and any(s is not x.ONE for s in r.shape(value)):
        return None
    new = r.read(value, (x.ZERO,) * rank(value), m)
    entries = [(k, wrap(r.read(i, r.align(i, slots)), r.shape(source)[k])) for k, i in given]
    pinned: dict[Expr, Expr] = {}  # an arange as an index pins its bound variable
    for k, e in entries:
        v = x.as_var(e)
        if v is not None and any(v is x.as_var(s) for s in slots) and v not in pinned:
            pinned[v] = c[k]
    here = tuple(x.substitute(s, pinned) for s in slots)  # read again there, so that the user's own list is known by its coordinates
    entries = [(k, wrap(r.read(i, r.align(i, here)), r.shape(source)[k])) for k, i in given]
    body = x.conj(*(x.in_range(q, v.args[1]) for v, q in pinned.items()), *(x.equal(e, c[k]) for k, e in entries))
    for s in slots:
        v = x.as_var(s)
        if v is not None and v not in pinned:
            body = x.exists(s, body)
    return x.select(body, new, r.read(source, c, m))


def _masked_assignment(r: Reader, n: Node, c: Coords, m: Mode, given: list[tuple[int, Node]]) -> Expr | None:
    """``t[mask] = constant``."""
    source, _, value = n.args[:3]
    if len(given) != 1 or any(s is not x.ONE for s in r.shape(value)):
        return None
    ((k, mask),) = given
    hit = r.read(mask, c[k : k + rank(mask)])
    return x.select(hit, r.coerce(n, r.read(value, (x.ZERO,) * rank(value), m)), r.read(source, c, m))


@values("isin")
def _isin(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Membership in a pool, which has no order: its elements are those of the tensor that it is a view of."""
    elements, pool = n.args[:2]
    if n.kwargs.get("assume_unique", False) or not is_tensor(pool) or not is_tensor(elements):
        return None
    while op_name(pool) in VIEWS and dtype(pool) == dtype(pool.args[0]):
        pool = pool.args[0]
    a = r.read(elements, c)
    slots = tuple(x.var(f"{n.name}.slot{d}", s) for d, s in enumerate(r.shape(pool)))
    entry = r.read(pool, slots)
    if not a.sort == entry.sort == x.INT or not slots:
        return None
    found = x.exists(slots[0], x.equal(entry, a)) if len(slots) == 1 else _in_row(entry, a, slots)
    return None if found is None else x.negate(found) if n.kwargs.get("invert", False) else found


VIEWS = frozenset("view reshape _unsafe_view flatten unflatten contiguous clone permute transpose t unsqueeze squeeze".split())
"""Other orders of the same elements."""


def _in_row(entry: Expr, value: Expr, slots: Coords) -> Expr | None:
    """``exists row, slot: M * row + list[row, slot] == value`` with entries from 0 to M - 1: only those of the row ``value // M``
    can be equal, and ``list[row, slot] == value % M`` is left of it."""
    *lead, slot = slots
    last = next((v for v in map(x.as_var, reversed(lead)) if v is not None), None)
    if last is None:
        return None
    step = x.ZERO
    for t, k in entry.args[1]:
        if t is last or t.op == "prod" and last in t.args[0] and not any(y.free - {last} for y in t.args[0]):
            step = x.plus(step, x.times(x.substitute(x.poly(t), {last: x.ONE}), k))
    row, rows = x.ZERO, x.ONE
    for v in lead:
        extent = s.args[1] if (s := x.as_var(v)) is not None else x.ONE
        row, rows = x.plus(x.times(row, extent), v), x.times(rows, extent)
    number = x.minus(entry, x.times(row, step))
    if step.lo < 1 or step.free or solve([], x.in_range(number, step), 200) is not None:
        return None
    here, rest = x.floordiv(value, step), x.mod(value, step)
    place: dict[Expr, Expr] = {}
    left = here
    for v in reversed(lead):
        if (s := x.as_var(v)) is not None:
            place[s] = x.mod(left, s.args[1])
            left = x.floordiv(left, s.args[1])
    hit = _listed(slot, x.TRUE, x.substitute(number, place), rest)
    return x.conj(x.in_range(here, rows), hit)


@values("cat", "concat")
def _cat(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    out: Expr | None = None
    for before_end, t, q in reversed(parts_of(r, n, c)):
        e = r.coerce(n, r.read(t, q, m))
        out = e if out is None else x.select(before_end, e, out)
    return out


@values("stack")
def _stack(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    d = axis(argument(n, 1, "dim", 0), rank(n))
    q = c[:d] + c[d + 1 :]
    out: Expr | None = None
    for k, t in reversed(list(enumerate(n.args[0]))):
        e = r.coerce(n, r.read(t, q, m))
        out = e if out is None else x.select(x.equal(c[d], x.integer(k)), e, out)
    return out
