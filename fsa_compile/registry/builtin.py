"""The built-in roles: causal and full attention (left), sliding window, compressed and selected (rewritten)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..kernels import ops as _registers_the_ops  # noqa: F401
from ..kernels.availability import why_no_kernel
from ..passes import expr as x
from ..passes.evaluate import DataDependent, at_point
from ..passes.expr import Expr
from ..passes.facts import order_facts
from ..passes.form_view import FormView
from ..passes.refusal import Refusal
from ..passes.visibility import affine_key, slot_and_offset
from ..report import Reason, ReasonKind
from .pattern import BlockList, Candidate, Pattern, Segment, Tensors

SHORT = 1024
"""Below so many queries dense attention is at least as fast. Measured on two CPU cores: selected attention against SDPA with a
ready mask takes 8 ms and 10 ms at 512 keys, 45 and 27 at 1024 (``benchmarks/results``)."""
SHORT_ON_CUDA = 4096
"""The same for selected attention on an H100, where full attention is level with it at 8192 keys and a dense mask, which the
user's code needs, costs several times full attention (``docs/kernels/selected.md``)."""


def first_true(n: int, holds: Any) -> int | None:
    """The least k in [0, n) with ``holds(k)``, for a property that stays true once it is; None if it never is."""
    if n == 0 or not holds(n - 1):
        return None
    lo, hi = 0, n - 1
    while lo < hi:
        mid = (lo + hi) // 2
        lo, hi = (lo, mid) if holds(mid) else (mid + 1, hi)
    return lo


def _no_kernel(form: FormView, device: torch.device, dtype: torch.dtype, block_size: int | None = None) -> Reason | None:
    """Why the op would fall back to a slow path on this device, or None."""
    hq, dk, dv = (form.reader.sizes.hint(s) for s in (form.form.sizes[1], *form.form.sizes[3:]))
    why = why_no_kernel(device, dtype, (hq, form.form.kv_heads), (dk, dv), block_size)
    return None if why is None else Reason(ReasonKind.UNPROFITABLE, f"no kernel for this case: {why}")


_LAST = "m - n"


def _offset(offset: int | None) -> dict[str, int | str]:
    """The parameter ``q_offset``: where query 0 stands if not at key 0; "m - n" puts the last query at the last key."""
    return {} if offset == 0 else {"q_offset": _LAST if offset is None else offset}


def _q_offset(parameters: Mapping[str, Any]) -> int | None:
    """The argument of an op."""
    offset = parameters.get("q_offset", 0)
    return None if offset == _LAST else offset


class Causal(Pattern):
    """Query i sees keys 0 to its own position."""

    name = "causal"
    rewrites = False

    def match(self, form: FormView) -> Iterable[Candidate]:
        if form.dense and not form.data_dependent():
            for first, offset in form.first_positions():
                position = x.plus(form.query, first)
                yield Candidate("causal", _offset(offset), lambda p, first=first: form.causal(p, first), witnesses=(position,))


class Full(Pattern):
    """Every query sees every key."""

    name = "full"
    rewrites = False

    def match(self, form: FormView) -> Iterable[Candidate]:
        if form.dense and not form.data_dependent():
            yield Candidate("full", {}, lambda p: x.TRUE, witnesses=(x.ZERO,))


class SlidingWindow(Pattern):
    """Query i sees keys ``i - window < p <= i``; as a band mask, look-back chunks, or an unfold."""

    name = "sliding_window"
    returns_lse = True

    def match(self, form: FormView) -> Iterable[Candidate]:
        if form.data_dependent():
            return
        affine = affine_key(form)
        for first, offset in form.first_positions():
            window = self._width_of_last_row(form, form.reader.sizes.hint(first))
            if window is None or form.dense and window == form.keys:
                continue
            position = x.plus(form.query, first)

            def visible(p: Expr, position: Expr = position, window: int = window) -> Expr:
                return x.conj(x.at_least(position, p), x.less(x.minus(position, p), x.integer(window)))

            index = () if affine is None else (x.times(x.minus(position, affine[1]), affine[2]),)
            yield Candidate("sliding_window", {"window": window, **_offset(offset)}, visible, witnesses=index)

    def _width_of_last_row(self, form: FormView, offset: int) -> int | None:
        last = form.queries - 1
        if last < 0:
            return None
        if not form.dense:
            return sum(form.sees(last, k) for k in range(form.width)) or None
        position = last + offset
        if position >= form.width:
            return None
        first = first_true(position + 1, lambda k: form.sees(last, k))
        return None if first is None else position - first + 1

    def pays(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
        window, n = candidate.parameters["window"], form.queries
        if form.dense and n < 4 * window or n < SHORT:
            return Reason(ReasonKind.UNPROFITABLE, f"{n} queries with a window of {window}: dense attention is as fast")
        return _no_kernel(form, device, dtype)

    def build(self, candidate: Candidate, t: Tensors) -> Any:
        p = candidate.parameters
        return torch.ops.fsa.sliding_window_attention(t.q, t.k, t.v, p["window"], t.scale, _q_offset(p))


class Compressed(Pattern):
    """Query i sees the prefix and every compressed key c with ``(c - prefix) * stride + last <= i``."""

    name = "compressed"
    returns_lse = True

    def match(self, form: FormView) -> Iterable[Candidate]:
        if not form.dense or form.data_dependent():
            return
        firsts = [first_true(form.queries, lambda q, c=c: form.sees(q, c)) for c in range(min(form.width, 64))]
        seen = [f for f in firsts if f is not None]
        prefix = sum(f == 0 for f in seen)
        rest = seen[prefix:]
        if not rest:
            return
        last, stride = rest[0], rest[1] - rest[0] if len(rest) > 1 else 1
        if stride < 1:
            return

        def visible(c: Expr) -> Expr:
            position = x.plus(x.times(x.minus(c, prefix), stride), last)
            return x.disj(x.less(c, x.integer(prefix)), x.at_least(form.query, position))

        yield Candidate("compressed", {"stride": stride, "last": last, "prefix": prefix}, visible, witnesses=(x.ZERO,))

    def pays(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
        if form.queries < SHORT:
            return Reason(ReasonKind.UNPROFITABLE, f"{form.queries} queries: dense attention is as fast")
        return _no_kernel(form, device, dtype)

    def build(self, candidate: Candidate, t: Tensors) -> Any:
        p = candidate.parameters
        return torch.ops.fsa.compressed_attention(t.q, t.k, t.v, t.scale, p["stride"], p["last"], p["prefix"], 0)


class Selected(Pattern):
    """Query i sees the keys of the blocks in a per-query list; as a mask over all keys or as gathered keys."""

    name = "selected"
    returns_lse = True

    def match(self, form: FormView) -> Iterable[Candidate]:
        if form.dense:
            yield from self._from_mask(form)
        else:
            yield from self._from_gather(form)

    def _from_mask(self, form: FormView) -> Iterator[Candidate]:
        """Memberships in lists, alone or joined with single blocks such as the query's own."""
        lists, singles = _memberships(form)
        if not lists or any(self._is_no_list_of_a_query(form, segment, size) for segment, size in lists):
            yield from self._from_map(form)
            return
        sizes = {size for _, size in lists}
        if len(sizes) != 1:
            return
        (block_size,) = sizes
        if block_size == 1:
            raise Refusal(ReasonKind.TOKEN_LEVEL, "the top-k picks single tokens, not blocks of keys")
        segments = tuple(s for s, _ in lists)
        joined = tuple(s for s, size in singles if size == block_size)
        for parts in (segments, (*segments, *joined)) if joined else (segments,):
            yield from self._candidates(form, parts, block_size, {})

    def _is_no_list_of_a_query(self, form: FormView, segment: Segment, block_size: int) -> bool:
        """Whether a list has more slots than there are blocks, or as many as data decide: coordinates of all queries in a row."""
        sizes, count = form.reader.sizes, slots(segment)
        return not sizes.known(count) or x.as_var(form.query) in segment.valid.free and sizes.hint(count) * block_size > form.keys

    def _from_map(self, form: FormView) -> Iterator[Candidate]:
        """A truth value per query and block, however it came about: the list of all blocks, those that are false not counting."""
        jv = x.as_var(form.form.j)
        conditions = form.form.visible.args if form.form.visible.op == "and" else (form.form.visible,)
        data = ("predicate", "compare", "apply", "load", "exists")
        opaque = [c for c in conditions if any(jv in t.free for t in x.walk(c) if t.op in data)]
        divisors = {x.constant(t.args[1]) for c in opaque for t in x.walk(c) if t.op == "div" and jv in t.args[0].free}
        (block_size, *others) = divisors or {None}
        if others or block_size is None or block_size < 2:
            return
        blocks = x.floordiv(x.plus(form.form.keys, block_size - 1), block_size)
        slot, offset = x.var("block", blocks), x.var("offset", block_size)
        mapping = {jv: x.plus(x.times(slot, block_size), offset)}
        listed = x.conj(*(x.substitute(c, mapping) for c in opaque))  # type: ignore[arg-type]
        if x.as_var(offset) not in listed.free:
            yield from self._candidates(form, (Segment(slot, listed, slot),), block_size, mapping)  # type: ignore[arg-type]

    def _from_gather(self, form: FormView) -> Iterator[Candidate]:
        """``key = block_size * list[slot] + offset``, perhaps clamped into range where it is masked."""
        width = x.constant(form.form.width)
        single_tokens = False
        for key in (form.form.key, *x.branches(form.form.key)):
            data = [(t, k) for t, k in key.args[1] if any(y.op == "apply" for y in x.walk(t))]
            if len(data) != 1 or width is None:
                continue
            atom, block_size = data[0]
            if block_size < 1 or width % block_size:
                continue
            slot, offset, mapping = slot_and_offset(form, block_size)
            entry = x.substitute(x.poly(atom), mapping)
            if x.plus(x.times(entry, block_size), offset) is not x.substitute(key, mapping):
                continue
            if block_size == 1:
                single_tokens = True
                continue
            seen = x.substitute(form.form.visible, mapping)
            at_first = x.substitute(seen, {x.as_var(offset): x.ZERO})  # type: ignore[dict-item]
            yield from self._candidates(form, (Segment(entry, x.TRUE, slot),), block_size, mapping)
            if at_first is not x.TRUE:
                yield from self._candidates(form, (Segment(entry, at_first, slot),), block_size, mapping)
        if single_tokens:
            raise Refusal(ReasonKind.TOKEN_LEVEL, "the top-k picks single tokens, not blocks of keys")

    def _candidates(
        self, form: FormView, segments: tuple[Segment, ...], block_size: int, index: Mapping[Expr, Expr]
    ) -> Iterator[Candidate]:
        """Candidates for a list of blocks."""
        for first, offset in form.first_positions():
            yield from self._standing_at(form, segments, block_size, index, first, offset)

    def _standing_at(
        self,
        form: FormView,
        segments: tuple[Segment, ...],
        block_size: int,
        index: Mapping[Expr, Expr],
        first: Expr,
        offset: int | None,
    ) -> Iterator[Candidate]:
        """One candidate per causal rule, for queries from position `first` on."""
        i, heads = form.query, form.form
        position = x.plus(i, first)
        parts = [e for s in segments for e in (s.entry, s.valid)]
        if x.as_var(i) is not None and not any(x.as_var(i) in e.free for e in parts):
            raise Refusal(ReasonKind.MASK, "one selection serves all queries: that is not selected attention")
        own = x.floordiv(position, block_size)
        facts, picks = order_facts(form.reader, parts, own)
        head = x.as_var(heads.h)
        shared = heads.groups == 1 or head is None
        if not shared:
            leader = {head: x.times(x.floordiv(heads.h, heads.groups), heads.groups)}
            shared = all(x.substitute(e, leader) is e for e in parts)

        def causal(p: Expr) -> Expr:
            return form.causal(p, first)

        def listed_only(p: Expr) -> Expr:
            return x.TRUE

        def diagonal(p: Expr) -> Expr:
            return x.implies(x.equal(x.floordiv(p, block_size), own), form.causal(p, first))

        def listed(p: Expr) -> Expr:
            block = x.floordiv(p, block_size)
            return x.disj(*(_holds(s, block) for s in segments))

        inside = x.mod(position, block_size)
        if form.dense:
            witnesses = (position, x.ZERO, *(x.times(pick, block_size) for pick, _ in picks))
        else:
            last = x.minus(form.form.width, block_size)
            witnesses = (*(x.plus(x.times(w, block_size), inside) for _, w in picks), x.ZERO, x.plus(last, inside))
        chosen = sum(form.reader.sizes.hint(slots(s)) for s in segments)
        every = any(_is_every_block(s) for s in segments)
        parameters = {
            "block_size": block_size, **({} if every else {"top_k": chosen}), "per": "kv head" if shared else "query head",
            **_offset(offset),
        }  # fmt: skip
        for rule, order in (("causal", causal), ("listed", listed_only), ("diagonal", diagonal)):
            yield Candidate(
                "selected", {**parameters, "rule": rule},
                visible=lambda p, order=order: x.conj(listed(p), order(p)),
                blocks=BlockList(segments, block_size, order, not shared, index),
                witnesses=witnesses, terms=(x.ZERO, *(w for _, w in picks)), facts=tuple(facts),
            )  # fmt: skip

    def pays(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
        p, n = candidate.parameters, form.keys
        attended = p["block_size"] * p["top_k"] if "top_k" in p else 0  # how many blocks a mask has is not known
        least = SHORT if device.type == "cpu" else SHORT_ON_CUDA
        if form.dense and 2 * attended > n or n < least:
            return Reason(ReasonKind.UNPROFITABLE, f"{attended} of {n} keys are selected: dense attention is as fast")
        return _no_kernel(form, device, dtype, p["block_size"])

    def build(self, candidate: Candidate, t: Tensors) -> Any:
        p = candidate.parameters
        return torch.ops.fsa.selected_attention(t.q, t.k, t.v, t.indices, p["block_size"], t.scale, p["rule"], _q_offset(p))


def slots(segment: Segment) -> Expr:
    """How many slots a segment has."""
    v = x.as_var(segment.slot)
    return v.args[1] if v is not None else x.ONE


def _is_every_block(segment: Segment) -> bool:
    """Whether the list is that of all blocks, and only `valid` chooses."""
    return segment.entry is segment.slot and x.as_var(segment.slot) is not None


def _holds(segment: Segment, block: Expr) -> Expr:
    """Whether a segment of a list holds a block."""
    slot = x.as_var(segment.slot)
    if slot is None:
        return x.conj(segment.valid, x.equal(segment.entry, block))
    if _is_every_block(segment):
        return x.conj(x.in_range(block, slot.args[1]), x.substitute(segment.valid, {slot: block}))
    return x.exists(segment.slot, x.conj(segment.valid, x.equal(segment.entry, block)))


Sized = tuple[Segment, int]


def _memberships(form: FormView) -> tuple[list[Sized], list[Sized]]:
    """The lists that the mask asks for the key's block, and single blocks that it is compared with; each with its block size."""
    jv = x.as_var(form.form.j)
    lists: list[Sized] = []
    singles: list[Sized] = []
    seen: set[Expr] = set()
    todo = [form.form.visible]
    while todo:
        t = todo.pop()
        if t in seen or jv not in t.free:
            continue
        seen.add(t)
        if t.op == "exists":
            found = _membership(t, jv, form)
            if found is not None:
                lists.append(found)
        elif t.op == "eq":
            split = _list_and_block(t.args[0], jv, None, form)
            if split is not None and split[1] > 1:
                singles.append((Segment(split[0], x.TRUE, x.ZERO), split[1]))
        elif t.sort == x.BOOL:
            todo.extend(c for c in x.children(t) if c.sort == x.BOOL)
    return lists, singles


def _membership(t: Expr, jv: Expr | None, form: FormView) -> Sized | None:
    slot, body = t.args
    valid = x.TRUE
    if body.op == "and":  # conditions on the slot beside the equality: entries that do not count
        equations = [c for c in body.args if jv in c.free]
        valid = x.conj(*(c for c in body.args if jv not in c.free))
        if len(equations) != 1:
            return None
        body = equations[0]
    split = _list_and_block(body.args[0], jv, slot, form) if body.op == "eq" else None
    return None if split is None else (Segment(split[0], valid, x.poly(slot)), split[1])


def _list_and_block(equation: Expr, jv: Expr | None, slot: Expr | None, form: FormView) -> tuple[Expr, int] | None:
    """``list[slot] - block(j) == 0`` taken apart: the list entry, and after how many keys the block number steps."""
    moving = [(t, k) for t, k in equation.args[1] if jv in t.free]
    if any(slot in t.free for t, _ in moving) or abs(moving[0][1]) != 1:  # the list must not depend on the key
        return None
    element = x.ZERO
    for t, k in moving:
        element = x.plus(element, x.times(x.poly(t), k))
    entry = x.minus(equation, element)
    if moving[0][1] > 0:
        entry, element = x.times(entry, -1), element
    else:
        element = x.times(element, -1)
    try:
        values = dict.fromkeys(element.free, 0)
        start = at_point(element, values, form.reader.sizes.hints)
        step = first_true(form.keys, lambda k: at_point(element, {**values, jv: k}, form.reader.sizes.hints) != start)
        first = [at_point(element, {**values, jv: k}, form.reader.sizes.hints) for k in range(step or 0, min(form.keys, 3))]
    except DataDependent:
        return None
    if step == 1 and len(first) == 2 and first[0] == first[1]:
        text = "the blocks of keys start at key 1, not at key 0: another key, such as a null key, stands in front of them"
        raise Refusal(ReasonKind.MASK, text)
    return entry, step if step is not None else max(form.keys, 1)


BUILTIN: tuple[Pattern, ...] = (Causal(), SlidingWindow(), Compressed(), Full(), Selected())
