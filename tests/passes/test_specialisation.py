"""Dynamic sizes that a proof needs to know more of: a guard is added where that leads to a rewrite, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fsa_compile
from fsa_compile.report import Report

from .end_to_end import BLOCK, DIM, HEADS, KV_HEADS, OPTIONS, TOLERANCE, TOP_K, why, WINDOW

INF = float("inf")
GROUP = HEADS // KV_HEADS


def given(n: int = 32, m: int | None = None, heads: int = HEADS, dim: int = DIM, values: int | None = None) -> tuple[Tensor, ...]:
    """q (3, heads, n, dim), k (3, heads / 2, m, dim), v (3, heads / 2, values, dim): no size of one meaning is one of another."""
    generator = torch.Generator().manual_seed(n)
    m = n if m is None else m
    shapes = (heads, n), (heads // GROUP, m), (heads // GROUP, m if values is None else values)
    return tuple(torch.randn(3, h, s, dim, generator=generator) for h, s in shapes)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(GROUP, 1) for t in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return (q @ k.mT * 0.3).masked_fill((distance < 0) | (distance >= WINDOW), -INF).softmax(-1) @ v


def window_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    mask = (distance >= 0) & (distance < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def gathered_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are gathered each for itself: nothing compares their lengths."""
    k, v = (t.repeat_interleave(GROUP, 1) for t in (k, v))
    place = torch.arange(q.shape[2])[:, None] - torch.arange(WINDOW)
    k, v = (t[:, :, place.clamp(min=0)] for t in (k, v))
    p = (torch.einsum("bhid,bhiwd->bhiw", q, k) * 0.3).masked_fill(place < 0, -INF).softmax(-1)
    return torch.einsum("bhiw,bhiwd->bhid", p, v)


def selected(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    """Blocks of all keys, as the scores (3, kv_heads, n, blocks) of the caller rank them; an added -inf."""
    listed = scores.topk(TOP_K, -1).indices
    chosen = torch.zeros(*listed.shape[:-1], k.shape[2] // BLOCK, dtype=torch.bool).scatter(-1, listed, True)
    seen = chosen.repeat_interleave(BLOCK, -1).repeat_interleave(GROUP, 1)
    k, v = (t.repeat_interleave(GROUP, 1) for t in (k, v))
    return (q @ k.mT * 0.3 + torch.zeros(seen.shape).masked_fill(~seen, -INF)).softmax(-1) @ v


def check(compiled: Callable[..., Tensor], fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Output and gradients of the compiled function are those of eager."""
    results = []
    for f in (compiled, fn):
        leaves = [t.detach().requires_grad_() for t in inputs]
        for t, leaf in zip(inputs, leaves):
            for d in getattr(t, "_dynamo_weak_dynamic_indices", ()):
                torch._dynamo.maybe_mark_dynamic(leaf, d)
            for d in getattr(t, "_dynamo_dynamic_indices", ()):
                torch._dynamo.mark_dynamic(leaf, d)
        out = f(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
        results.append((out, *(torch.zeros(()) if g is None else g for g in grads)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


def compile_(fn: Callable[..., Tensor], dynamic: bool | None = None) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(fn, backend="fsa", fullgraph=True, dynamic=dynamic, options=OPTIONS)


def roles(report: Report) -> list[str | None]:
    """By graph: the role of the one site if it is rewritten."""
    return [s.role if s.verdict is fsa_compile.Verdict.REWRITTEN else None for g in report.graphs for s in g.sites]


def lengths_marked(inputs: tuple[Tensor, ...], mark: Callable[[Tensor, int], None] = torch._dynamo.maybe_mark_dynamic):
    for t in inputs:
        mark(t, 2)
    return inputs


@pytest.mark.parametrize("fn", [window, window_sdpa], ids=lambda f: f.__name__)
def test_heads_become_numbers(fn):
    """With dynamic=True heads of inputs have no number. One is guarded: lengths stay dynamic, other heads compile again."""
    compiled = compile_(fn, dynamic=True)
    for n in (32, 40, 27):
        check(compiled, fn, given(n))
    assert roles(fsa_compile.last_report()) == ["sliding_window"], why(fsa_compile.last_report())
    check(compiled, fn, given(heads=6, dim=12))
    assert roles(fsa_compile.last_report()) == ["sliding_window"] * 2


def test_nothing_is_guarded_where_nothing_comes_of_it():
    """The mask is no rule of an op whatever the sizes are: the first graph serves all heads."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(GROUP, 1) for t in (k, v))
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        return (q @ k.mT * 0.3).masked_fill((distance < 0) | (distance % 5 == 2), -INF).softmax(-1) @ v

    compiled = compile_(fn, dynamic=True)
    for heads in (4, 6, 10):
        check(compiled, fn, given(heads=heads))
    report = fsa_compile.last_report()
    assert roles(report) == [None] and len(report.graphs) == 1, why(report)


def test_lengths_of_keys_and_values_become_one():
    """Longer values are legal in eager, which never reads the rest: another graph, as right."""
    compiled = compile_(gathered_window)
    for n in (32, 40, 27):
        check(compiled, gathered_window, lengths_marked(given(n)))
    assert roles(fsa_compile.last_report()) == ["sliding_window"], why(fsa_compile.last_report())
    for m, values in ((32, 35), (36, 33), (36, 36)):
        check(compiled, gathered_window, lengths_marked(given(32, m, values=values)))
    assert len(fsa_compile.last_report().graphs) > 1


def test_scores_of_fewer_blocks_need_no_guard():
    """Scores of fewer blocks than keys have are legal in eager: the last blocks are then never chosen. One graph serves all."""
    compiled = compile_(selected)
    for n, fewer in ((32, 0), (48, 0), (48, 3)):
        scores = torch.randn(3, KV_HEADS, n, n // BLOCK - fewer, generator=torch.Generator().manual_seed(3))
        torch._dynamo.maybe_mark_dynamic(scores, 2)
        torch._dynamo.maybe_mark_dynamic(scores, 3)
        check(compiled, selected, (*lengths_marked(given(n)), scores))
    assert set(roles(fsa_compile.last_report())) == {"selected"}, why(fsa_compile.last_report())


def test_keys_longer_than_a_number_of_blocks_need_no_guard():
    """Dynamo knows how many blocks these scores have as a number; longer keys are legal in eager, and never chosen."""
    compiled = compile_(selected)
    for n in (32, 40):
        scores = torch.randn(3, KV_HEADS, n, 8, generator=torch.Generator().manual_seed(3))
        torch._dynamo.maybe_mark_dynamic(scores, 2)
        check(compiled, selected, (*lengths_marked(given(n)), scores))
    assert set(roles(fsa_compile.last_report())) == {"selected"}, why(fsa_compile.last_report())


def test_what_the_user_marks_stays_dynamic():
    """`mark_dynamic` makes Dynamo raise if a guard leaves one number: heads are not guarded then, and the site is left."""

    def marked(heads: int) -> tuple[Tensor, ...]:
        inputs = given(heads=heads)
        for t in inputs:
            for d in (0, 1):
                torch._dynamo.mark_dynamic(t, d)
        return inputs

    compiled = compile_(window_sdpa)
    for heads in (4, 6):
        check(compiled, window_sdpa, marked(heads))
    report = fsa_compile.last_report()
    assert roles(report) == [None] and len(report.graphs) == 1, why(report)


def test_lengths_with_bounds_are_not_guarded():
    """A mark with bounds forbids every guard that the bounds do not imply, equality with another length too."""
    compiled = compile_(gathered_window)

    def mark(t: Tensor, d: int) -> None:
        torch._dynamo.mark_dynamic(t, d, min=16, max=64)

    inputs = lengths_marked(given(32), mark)
    compiled(*inputs)
    assert roles(fsa_compile.last_report()) == [None]
