"""Queries that see no key: every way of masking, with and without gradients, gives what eager gives, or is refused.

In eager a row without keys is NaN, zero, or an average over masked keys, and each has a gradient of its own, down to which
entries of it are NaN. The op gives zeros and lse = -inf; the rewrite repairs the row from that, or the site is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsa_compile.report import ReasonKind, Verdict

from .end_to_end import BLOCK, DIM, KV_HEADS, LENGTH, TOP_K, compiled_like_eager, only_site, qkv, why

INF = math.inf
MIN = torch.finfo(torch.float32).min
SCALE = DIM**-0.5

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * SCALE


def filled(fill: float) -> Attend:
    return lambda q, k, v, mask: scores(q, k).masked_fill(~mask, fill).softmax(-1) @ v


def chosen(fill: float) -> Attend:
    return lambda q, k, v, mask: torch.where(mask, scores(q, k), fill).softmax(-1) @ v


def added(fill: float) -> Attend:
    return lambda q, k, v, mask: (scores(q, k) + torch.zeros(mask.shape).masked_fill(~mask, fill)).softmax(-1) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores(q, k) - (~mask).float() * 1e9).softmax(-1) @ v


def nan_to_num(fill: float = -INF, add: bool = False) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k)
        s = s + torch.zeros(mask.shape).masked_fill(~mask, fill) if add else s.masked_fill(~mask, fill)
        return s.softmax(-1).nan_to_num(0.0) @ v

    return attend


def nan_to_num_of_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return filled(-INF)(q, k, v, mask).nan_to_num(0.0)


def masked_again(fill: float, add: bool = False) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k)
        s = s + torch.zeros(mask.shape).masked_fill(~mask, fill) if add else s.masked_fill(~mask, fill)
        return s.softmax(-1).masked_fill(~mask, 0.0) @ v

    return attend


def multiplied(fill: float, *, rows: bool = False, add: bool = False, repair: str = "") -> Attend:
    """Probabilities times the mask, or times whether the row sees anything; `nan_to_num` before or after."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k)
        s = s + torch.zeros(mask.shape).masked_fill(~mask, fill) if add else s.masked_fill(~mask, fill)
        p = s.softmax(-1)
        p = p.nan_to_num(0.0) if repair == "before" else p
        p = p * (mask.any(-1, keepdim=True) if rows else mask.to(p.dtype))
        return (p.nan_to_num(0.0) if repair == "after" else p) @ v

    return attend


def output_times_rows(fill: float) -> Attend:
    return lambda q, k, v, mask: filled(fill)(q, k, v, mask) * mask.any(-1, keepdim=True)


def multiplied_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return handmade_weights(q, k, mask, -1e9) * mask @ v


def rows_repaired(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`where(any key, output, 0)` behind the attention."""
    return torch.where(mask.any(-1, keepdim=True), filled(-1e9)(q, k, v, mask), 0.0)


def rows_zeroed(attend: Attend, *, by: str = "times", others: int = 0) -> Attend:
    """The output of rows that see nothing is set to zero; `others`: of rows that see nothing but the first keys."""

    def zeroed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, some = attend(q, k, v, mask), mask[..., others:].any(-1, keepdim=True)
        if by == "times":
            return out * some.to(out.dtype)
        return out.masked_fill(~some, 0.0) if by == "masked_fill" else torch.where(some, out, torch.zeros_like(out))

    return zeroed


def rows_shown(attend: Attend, *, first: bool = False) -> Attend:
    """Rows that see nothing are shown all keys, or the first one, so that they are no rows of NaN."""

    def shown(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        empty = ~mask.any(-1, keepdim=True)
        return attend(q, k, v, mask | (empty & (torch.arange(k.shape[2]) == 0) if first else empty))

    return shown


def sdpa(additive: float | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        bias = mask if additive is None else torch.zeros(mask.shape).masked_fill(~mask, additive)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return attend


def handmade_weights(q: Tensor, k: Tensor, mask: Tensor, fill: float) -> Tensor:
    s = scores(q, k).masked_fill(~mask, fill)
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    return e / e.sum(-1, keepdim=True)


def refilled(value: float, *, again: bool = False, others: int = 0) -> Attend:
    """-inf, and then a number in whole rows that see nothing; `others`: or see nothing but the first keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k).masked_fill(~mask, -INF)
        p = s.masked_fill(~mask[..., others:].any(-1, keepdim=True), value).softmax(-1)
        return (p * mask if again else p) @ v

    return attend


def handmade(fill: float) -> Attend:
    return lambda q, k, v, mask: handmade_weights(q, k, mask, fill) @ v


def partly_added(fill: float) -> Attend:
    """Every second masked logit is a sum, which has a gradient; the others are replaced."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k)
        even = torch.arange(k.shape[2]) % 2 == 0
        return torch.where(mask, s, torch.where(even, s + fill, fill)).softmax(-1) @ v

    return attend


def added_to_detached(fill: float) -> Attend:
    """Masked logits are sums without a gradient."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k)
        return torch.where(mask, s, s.detach() + fill).softmax(-1) @ v

    return attend


def added_by_hand(fill: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = scores(q, k) + torch.zeros(mask.shape).masked_fill(~mask, fill)
        e = (s - s.amax(-1, keepdim=True).detach()).exp()
        return e / e.sum(-1, keepdim=True) @ v

    return attend


def by_hand(
    before: Callable[[Tensor, Tensor], Tensor],
    *,
    minus: Callable[[Tensor], Tensor] = lambda s: s.amax(-1, keepdim=True),
    behind: Callable[[Tensor, Tensor], Tensor] = lambda e, mask: e,
    floor: Callable[[Tensor], Tensor] = lambda total: total,
) -> Attend:
    """Weights of logits that are masked `before` the exponential and `behind` it, divided by what `floor` makes of their sum."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = before(scores(q, k), mask)
        e = behind((s - minus(s)).exp(), mask)
        return e / floor(e.sum(-1, keepdim=True)) @ v

    return attend


def fill_with(fill: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, mask: t.masked_fill(~mask, fill)


def add_to(fill: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, mask: t + torch.zeros(mask.shape).masked_fill(~mask, fill)


def no_maximum(s: Tensor) -> Tensor:
    return torch.zeros(())


def times(e: Tensor, mask: Tensor) -> Tensor:
    return e * mask


def clamped(total: Tensor) -> Tensor:
    return total.clamp_min(1e-9)


def clamped_low(total: Tensor) -> Tensor:
    return total.clamp(min=1e-36)


def maximum_of_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return by_hand(fill_with(MIN), minus=lambda s: scores(q, k).amax(-1, keepdim=True))(q, k, v, mask)


def never_zero(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)


def normalised_again(
    before: Callable[[Tensor, Tensor], Tensor], floor: Callable[[Tensor], Tensor] = lambda total: total
) -> Attend:
    """Probabilities that are masked and divided by their sum."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        p = before(scores(q, k), mask).softmax(-1) * mask
        return p / floor(p.sum(-1, keepdim=True)) @ v

    return attend


BY_HAND: dict[str, Attend] = {
    "no maximum, -inf": by_hand(fill_with(-INF), minus=no_maximum),
    "no maximum, finite": by_hand(fill_with(-1e9), minus=no_maximum),
    "no maximum, finite, added": by_hand(add_to(MIN), minus=no_maximum),
    "no maximum, finite, never zero": by_hand(fill_with(-1e9), minus=no_maximum, floor=never_zero),
    "no maximum, multiplied, never zero": by_hand(lambda s, mask: s, minus=no_maximum, behind=times, floor=never_zero),
    "mean subtracted, finite": by_hand(fill_with(-1e9), minus=lambda s: s.mean(-1, keepdim=True)),
    "maximum of all": maximum_of_all,
    "maximum, -inf, added, filled": by_hand(add_to(-INF), behind=fill_with(0.0)),
    "maximum, -inf, clamped": by_hand(fill_with(-INF), floor=clamped),
    "maximum, finite, clamped": by_hand(fill_with(-1e9), floor=clamped),
    "maximum, finite, multiplied": by_hand(fill_with(-1e9), behind=times),
    "maximum, finite, multiplied, clamped": by_hand(fill_with(-1e9), behind=times, floor=clamped),
    "maximum, finite, added, multiplied, clamped": by_hand(add_to(MIN), behind=times, floor=clamped),
    "maximum, finite, multiplied, plus 1e-9": by_hand(fill_with(-1e9), behind=times, floor=lambda total: total + 1e-9),
    "maximum, finite, multiplied, clamped at 1e-36": by_hand(fill_with(-1e9), behind=times, floor=clamped_low),
    "maximum, -inf, multiplied, clamped": by_hand(fill_with(-INF), behind=times, floor=clamped),
    "maximum, -inf, filled, clamped": by_hand(fill_with(-INF), behind=fill_with(0.0), floor=clamped),
    "maximum, -inf, added, filled, clamped": by_hand(add_to(-INF), behind=fill_with(0.0), floor=clamped),
    "normalised again": normalised_again(lambda s, mask: s),
    "normalised again, finite": normalised_again(fill_with(-1e9)),
    "normalised again, finite, clamped": normalised_again(fill_with(-1e9), clamped),
    "normalised again, -inf, clamped": normalised_again(fill_with(-INF), clamped),
}
"""Weights by hand, whose rows without keys are 0 / 0, or 0 / 1e-9, or what the largest fill makes of them."""

WAYS: dict[str, Attend] = {
    **BY_HAND,
    "masked_fill -inf": filled(-INF),
    "masked_fill finfo.min": filled(MIN),
    "masked_fill -1e9": filled(-1e9),
    "masked_fill a tenth of finfo.min": filled(MIN / 10),
    "where -inf": chosen(-INF),
    "where finfo.min": chosen(MIN),
    "added -inf": added(-INF),
    "added -inf, some replaced": partly_added(-INF),
    "added -inf to detached": added_to_detached(-INF),
    "added -inf, softmax by hand": added_by_hand(-INF),
    "added finfo.min": added(MIN),
    "added -1e9": added(-1e9),
    "added -1e30": added(-1e30),
    "added finfo.min, some replaced": partly_added(MIN),
    "added finfo.min to detached": added_to_detached(MIN),
    "added finfo.min, softmax by hand": added_by_hand(MIN),
    "subtracted 1e9": subtracted,
    "rows refilled with 0": refilled(0.0),
    "rows refilled with 3": refilled(3.0),
    "rows refilled, multiplied": refilled(0.0, again=True),
    "more rows refilled": refilled(0.0, others=4),
    "nan_to_num": nan_to_num(),
    "nan_to_num, added": nan_to_num(add=True),
    "nan_to_num, finite": nan_to_num(-1e9),
    "nan_to_num of the output": nan_to_num_of_output,
    "masked again, -inf": masked_again(-INF),
    "masked again, finite": masked_again(-1e9),
    "masked again, finite, added": masked_again(-1e9, add=True),
    "masked again, -inf, added": masked_again(-INF, add=True),
    "multiplied, -inf": multiplied(-INF),
    "multiplied, finite": multiplied(-1e9),
    "multiplied, finfo.min": multiplied(MIN),
    "multiplied, finite, added": multiplied(-1e9, add=True),
    "multiplied, -inf, added": multiplied(-INF, add=True),
    "multiplied by rows, -inf": multiplied(-INF, rows=True),
    "multiplied by rows, finite": multiplied(-1e9, rows=True),
    "multiplied by rows, finite, added": multiplied(-1e9, rows=True, add=True),
    "nan_to_num, multiplied": multiplied(-INF, repair="before"),
    "multiplied, nan_to_num": multiplied(-INF, repair="after"),
    "multiplied by rows, nan_to_num": multiplied(-INF, rows=True, repair="after"),
    "multiplied, softmax by hand": multiplied_by_hand,
    "output times rows, -inf": output_times_rows(-INF),
    "output times rows, finite": output_times_rows(-1e9),
    "rows repaired": rows_repaired,
    "output times rows, added -1e9": rows_zeroed(added(-1e9)),
    "output times rows, nan_to_num": rows_zeroed(nan_to_num()),
    "output times rows, nan_to_num, added": rows_zeroed(nan_to_num(add=True)),
    "output times rows, SDPA, finfo.min": rows_zeroed(sdpa(MIN)),
    "output masked, -inf": rows_zeroed(filled(-INF), by="masked_fill"),
    "output masked, added -inf": rows_zeroed(added(-INF), by="masked_fill"),
    "output masked, finite": rows_zeroed(filled(-1e9), by="masked_fill"),
    "output masked, more rows": rows_zeroed(filled(-1e9), by="masked_fill", others=4),
    "rows shown all keys": rows_shown(filled(-INF)),
    "rows shown all keys, SDPA": rows_shown(sdpa()),
    "rows shown all keys, output times rows": rows_zeroed(rows_shown(filled(-INF))),
    "rows shown all keys, added, output masked": rows_zeroed(rows_shown(added(-INF)), by="masked_fill"),
    "rows shown all keys, SDPA, output chosen": rows_zeroed(rows_shown(sdpa()), by="where"),
    "rows shown all keys, SDPA, added, output times rows": rows_zeroed(rows_shown(sdpa(-INF))),
    "rows shown the first key, output times rows": rows_zeroed(rows_shown(filled(-INF), first=True)),
    "rows shown all keys, more rows masked": rows_zeroed(rows_shown(filled(-INF)), by="masked_fill", others=4),
    "SDPA, truths": sdpa(),
    "SDPA, added -inf": sdpa(-INF),
    "SDPA, added finfo.min": sdpa(MIN),
    "SDPA, added -1e9": sdpa(-1e9),
    "softmax by hand, -inf": handmade(-INF),
    "softmax by hand, finite": handmade(-1e9),
}
MUST_FIRE_WITHOUT_GRAD = {
    "no maximum, -inf",
    "no maximum, finite",
    "no maximum, finite, never zero",
    "no maximum, multiplied, never zero",
    "maximum, finite, clamped",
    "maximum, finite, multiplied, clamped",
    "maximum, finite, added, multiplied, clamped",
    "maximum, finite, multiplied, plus 1e-9",
    "maximum, -inf, filled, clamped",
    "normalised again, finite, clamped",
    "masked_fill -inf",
    "masked_fill finfo.min",
    "masked_fill -1e9",
    "where -inf",
    "where finfo.min",
    "added -inf",
    "added finfo.min",
    "added -1e30",
    "rows refilled with 0",
    "rows refilled with 3",
    "rows refilled, multiplied",
    "nan_to_num",
    "nan_to_num, added",
    "masked again, -inf",
    "masked again, -inf, added",
    "masked again, finite",
    "multiplied, -inf",
    "multiplied, finite",
    "multiplied, finfo.min",
    "multiplied, finite, added",
    "multiplied by rows, -inf",
    "multiplied by rows, finite",
    "multiplied by rows, finite, added",
    "nan_to_num, multiplied",
    "multiplied, nan_to_num",
    "multiplied by rows, nan_to_num",
    "multiplied, softmax by hand",
    "output times rows, -inf",
    "output times rows, finite",
    "output times rows, added -1e9",
    "output times rows, nan_to_num",
    "output times rows, nan_to_num, added",
    "output times rows, SDPA, finfo.min",
    "output masked, -inf",
    "output masked, finite",
    "rows shown all keys, output times rows",
    "rows shown all keys, added, output masked",
    "rows shown all keys, SDPA, output chosen",
    "rows shown all keys, SDPA, added, output times rows",
    "rows shown the first key, output times rows",
    "SDPA, truths",
    "SDPA, added -inf",
}
"""Ways in which a row without keys has a value that the op's log-sum-exp can repair: refusing them would be idle."""
MUST_FIRE_WITH_GRAD = MUST_FIRE_WITHOUT_GRAD


def strict(n: int = LENGTH) -> Tensor:
    """Blocks before the query's own: the first block's queries see nothing."""
    own = torch.arange(n)[:, None] // BLOCK
    return torch.arange(n) // BLOCK < own


def compressed_mask(m: int, n: int = LENGTH) -> Tensor:
    return torch.arange(m) * 4 + 3 <= torch.arange(n)[:, None]


def selection(q: Tensor, k: Tensor) -> Tensor:
    """Blocks by score alone, future ones among them: early queries may see nothing once causality is applied."""
    indices = (q @ k.unflatten(2, (-1, BLOCK)).mean(3).mT).topk(TOP_K, -1).indices
    blocks = torch.zeros(*indices.shape[:-1], k.shape[2] // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    return blocks.repeat_interleave(BLOCK, -1) & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()


def check(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], must_fire: bool, role: str) -> None:
    report = compiled_like_eager(fn, inputs)
    site = only_site(report)
    if must_fire:
        assert (site.verdict, site.role) == (Verdict.REWRITTEN, role), why(report)
    elif site.verdict is not Verdict.REWRITTEN:
        assert site.reason is not None
        kinds = (ReasonKind.EMPTY_ROWS, ReasonKind.GRADIENT, ReasonKind.FILL, ReasonKind.LOGITS, ReasonKind.MASK)
        assert site.reason.kind in kinds, why(report)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.replace(" ", "_"))
def test_selected_rows_that_see_nothing(way: str, grad: bool) -> None:
    inputs = tuple(t.requires_grad_(grad) for t in (t.detach() for t in qkv()))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return WAYS[way](q, k, v, selection(q, k))

    assert (~selection(inputs[0], inputs[1]).any(-1)).any(), "the inputs have no row without keys"
    check(fn, inputs, way in (MUST_FIRE_WITH_GRAD if grad else MUST_FIRE_WITHOUT_GRAD), "selected")


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.replace(" ", "_"))
def test_compressed_rows_that_see_nothing(way: str, grad: bool) -> None:
    inputs = tuple(t.requires_grad_(grad) for t in (t.detach() for t in qkv(m=LENGTH // 4)))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return WAYS[way](q, k, v, compressed_mask(k.shape[2]))

    check(fn, inputs, way in (MUST_FIRE_WITH_GRAD if grad else MUST_FIRE_WITHOUT_GRAD), "compressed")


@pytest.mark.parametrize("way", ["added -1e9", "subtracted 1e9", "SDPA, added -1e9"], ids=lambda w: w.replace(" ", "_"))
@pytest.mark.parametrize("dtype, factor", [(torch.float64, 1.0), (torch.float32, 200.0)], ids=["float64", "large_logits"])
def test_a_sum_with_a_finite_fill_need_not_forget_the_logit(way: str, dtype: torch.dtype, factor: float) -> None:
    """``-1e9 + logit`` is -1e9 in float32 if the logit is below 32: only then is a row without keys a plain average."""
    q, k, v = (t.detach().to(dtype) for t in qkv(m=LENGTH // 4))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return WAYS[way](q * factor, k, v, compressed_mask(k.shape[2]))

    check(fn, (q, k, v), False, "compressed")


def test_a_sum_with_finfo_min_forgets_the_logit() -> None:
    inputs = tuple(t.detach() for t in qkv(m=LENGTH // 4))
    check(lambda q, k, v: added(MIN)(q, k, v, compressed_mask(k.shape[2])), inputs, True, "compressed")


@pytest.mark.parametrize(
    "way",
    ["masked_fill -inf", "masked_fill finfo.min", "added -inf", "nan_to_num", "nan_to_num, added", "SDPA, truths"],
    ids=lambda w: w.replace(" ", "_"),
)
def test_grouped_heads_repair_each_query_head(way: str) -> None:
    """The repaired value is that of the head's own values."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return WAYS[way](q, k, v, compressed_mask(k.shape[2]))

    check(fn, qkv(m=LENGTH // 4, kv_heads=KV_HEADS), True, "compressed")


@pytest.mark.parametrize("late", [-1, 0, 1])
def test_rows_zeroed_by_position(late: int) -> None:
    """The first query with a key is number 3: a zero for one query less, or one more, is another function."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return filled(-1e9)(q, k, v, compressed_mask(k.shape[2])) * (torch.arange(LENGTH) >= 3 + late)[:, None]

    site = only_site(compiled_like_eager(fn, qkv(m=LENGTH // 4)))
    assert (site.verdict, site.parameters["empty_rows"]) == (Verdict.REWRITTEN, "mean" if late else "zero")


@pytest.mark.parametrize("late", [-1, 1])
def test_rows_shown_other_keys_and_zeroed_by_position(late: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rows_shown(filled(-INF))(q, k, v, compressed_mask(k.shape[2])) * (torch.arange(LENGTH) >= 3 + late)[:, None]

    assert only_site(compiled_like_eager(fn, qkv(m=LENGTH // 4))).verdict is Verdict.REFUSED


def gathered(q: Tensor, k: Tensor, v: Tensor, fill: float, repair: bool = False) -> Tensor:
    """Per-query gather of blocks; where all of them lie in the future, nothing is left."""
    b, h, n, _ = q.shape
    indices = (q @ k.unflatten(2, (-1, BLOCK)).mean(3).mT).topk(TOP_K, -1).indices
    batch, head = torch.arange(b)[:, None, None, None], torch.arange(h)[:, None, None]
    keys, values = (t.unflatten(2, (-1, BLOCK))[batch, head, indices].flatten(3, 4) for t in (k, v))
    position = (indices[..., None] * BLOCK + torch.arange(BLOCK)).flatten(-2)
    s = torch.einsum("bhid,bhijd->bhij", q, keys) * SCALE
    p = s.masked_fill(position > torch.arange(n)[:, None], fill).softmax(-1)
    return torch.einsum("bhij,bhijd->bhid", p.nan_to_num(0.0) if repair else p, values)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize(
    "fill, repair", [(-INF, False), (-INF, True), (MIN, False), (-1e9, False)], ids=["-inf", "nan_to_num", "finfo.min", "-1e9"]
)
def test_gathered_rows_that_see_nothing(fill: float, repair: bool, grad: bool) -> None:
    """In eager the NaN of such a row reaches the gradient of the gathered values only, and a finite fill averages over those."""
    inputs = tuple(t.requires_grad_(grad) for t in (t.detach() for t in qkv()))
    check(lambda q, k, v: gathered(q, k, v, fill, repair), inputs, repair, "selected")


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("fill", [-INF, -1e9], ids=["-inf", "-1e9"])
def test_unfolded_rows_that_see_nothing(fill: float, grad: bool) -> None:
    """A strict window by pad and unfold: query 0 sees only padding."""
    inputs = tuple(t.requires_grad_(grad) for t in (t.detach() for t in qkv()))

    def fn(q: Tensor, k: Tensor, v: Tensor, window: int = 8) -> Tensor:
        keys, values = (F.pad(t, (0, 0, window, 0))[:, :, :-1].unfold(2, window, 1) for t in (k, v))
        position = torch.arange(LENGTH)[:, None] - window + torch.arange(window)
        s = torch.einsum("bhid,bhidw->bhiw", q, keys) * SCALE
        return torch.einsum("bhiw,bhidw->bhid", s.masked_fill(position < 0, fill).softmax(-1), values)

    compiled_like_eager(fn, inputs)


@pytest.mark.parametrize("fills", [(-INF, -1e9), (MIN, -1e9), (-1e9, -1e9)], ids=str)
def test_two_fills_in_one_row(fills: tuple[float, float]) -> None:
    """Causality and selection masked apart: with one finite fill below another, the higher one is averaged alone."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        mask = selection(q, k)
        return scores(q, k).masked_fill(~mask, fills[1]).masked_fill(~causal, fills[0]).softmax(-1) @ v

    report = compiled_like_eager(fn, qkv())
    site = only_site(report)
    assert site.verdict is Verdict.REWRITTEN or site.reason is not None


def test_padded_rows_by_an_input_are_not_ours() -> None:
    """A padding mask is run-time data: nothing is known about its rows."""
    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    padding[:, :3] = False

    def fn(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & padding[:, None, None, :]
        return filled(-INF)(q, k, v, mask)

    report = compiled_like_eager(fn, (*qkv(), padding))
    assert only_site(report).verdict is Verdict.REFUSED
