"""Analysis ends: models in which reading the mask or the operands multiplies with every line get a reason in bounded time.

Each model takes minutes without the bound, or nests deeper than Python does. Time is that of this thread, so that a loaded
machine changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fsa_compile.passes import expr as x
from fsa_compile.passes.judge import Judge
from fsa_compile.report import ReasonKind, Verdict

from .end_to_end import DIM, HEADS, LENGTH, WINDOW, band, compiled_like_eager, qkv, why

SCALE = DIM**-0.5
SECONDS = 0.3


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def causal() -> Tensor:
    i = torch.arange(LENGTH)
    return i[:, None] >= i


def many_masks_are_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """2**40 combinations of masks."""
    i = torch.arange(LENGTH)
    far = i[:, None] - i
    logits = q @ k.mT * SCALE
    for step in range(2, 42):
        logits = logits + torch.where(far % step == step // 2, -torch.inf, 0.0)
    return logits.softmax(-1) @ v


def keys_are_rolled_by_cat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each concatenation doubles the places that a key may come from."""
    for r in range(1, 31):
        k, v = (torch.cat((t[:, :, r:], t[:, :, :r]), 2) for t in (k, v))
    return attend(q, k, v, causal())


def permutations_of_permutations(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An index that is read at itself, again and again."""
    index = q.sum(-1).argsort(-1)
    for _ in range(24):
        k, v = (t.gather(2, index[..., None].expand(-1, -1, -1, DIM)) for t in (k, v))
        index = index.gather(-1, index)
    return attend(q, k, v, causal())


def shuffled_layouts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions that are dealt out and rolled, again and again."""

    def deal(t: Tensor) -> Tensor:
        for _ in range(24):
            t = t.unflatten(2, (-1, 4)).transpose(2, 3).flatten(2, 3).roll(1, 2)
        return t

    return attend(deal(q), deal(k), deal(v), causal())


HARD = (many_masks_are_added, keys_are_rolled_by_cat, permutations_of_permutations, shuffled_layouts)


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that judging took."""
    seconds: list[float] = []
    original = Judge.judge

    def judge(*args):
        start = time.thread_time()
        try:
            return original(*args)
        finally:
            seconds.append(time.thread_time() - start)

    monkeypatch.setattr(Judge, "judge", judge)
    return seconds


@pytest.mark.parametrize("fn", HARD, ids=lambda f: f.__name__)
def test_reading_ends(fn: Callable[..., Tensor], spent: list[float]) -> None:
    inputs = tuple(t.detach() for t in qkv())
    report = compiled_like_eager(fn, inputs, tolerance=1e-5, proof_seconds=SECONDS)
    assert [s.reason.kind for s in report.sites if s.reason is not None] == [ReasonKind.UNDECIDED], why(report)
    assert max(spent) < 4 * SECONDS + 4  # without a bound: half a minute and more


def test_what_comes_to_nothing_leaves_time_for_the_rest(spent: list[float]) -> None:
    """Two hopeless sites, on lines of their own, and a window behind them."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = many_masks_are_added(q, k, v)
        second = keys_are_rolled_by_cat(q, k, v)
        return first + second + attend(q, k, v, band(LENGTH, WINDOW))

    report = compiled_like_eager(fn, tuple(t.detach() for t in qkv()), tolerance=1e-5, proof_seconds=3 * SECONDS)
    assert [s.verdict for s in report.sites] == [Verdict.REFUSED, Verdict.REFUSED, Verdict.REWRITTEN], why(report)
    assert max(spent) < 8 * SECONDS + 4


def endless() -> None:
    e = x.var("i", 8)
    for k in range(10**9):
        e = x.plus(e, x.var(f"i{k % 7}", 8))


def test_a_limit_ends_with_its_block() -> None:
    with pytest.raises(x.TimeSpent), x.time_limit(0.05):
        endless()
    start = time.thread_time()
    while time.thread_time() - start < 0.1:
        x.plus(x.var("i", HEADS), x.ONE)


def test_an_outer_limit_holds_inside() -> None:
    start = time.thread_time()
    with pytest.raises(x.TimeSpent), x.time_limit(0.05), x.time_limit(100.0):
        endless()
    assert time.thread_time() - start < 1
