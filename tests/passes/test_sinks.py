"""Keys beside those of the model (sinks, null keys) and clamped last blocks: refused, for the reason that is true."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fsa_compile.report import ReasonKind, Report

from .end_to_end import BLOCK, DIM, LENGTH, assert_refused, band, compiled_like_eager, only_site, qkv, randoms

INF = float("inf")


def blocks(q: Tensor, k: Tensor) -> Tensor:
    """Two selected blocks and the own one as a token mask (b, h, n, n), causal."""
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    own = torch.arange(LENGTH)[:, None] // BLOCK == torch.arange(LENGTH // BLOCK)
    indices = (q @ pooled.transpose(-1, -2)).masked_fill(own, INF).topk(3, -1).indices
    chosen = torch.zeros(*indices.shape[:3], LENGTH // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    return chosen.repeat_interleave(BLOCK, -1) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def text(report: Report) -> str:
    return str(only_site(report).reason)


def test_a_sink_before_the_logits() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        logits = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~blocks(q, k), -INF)
        logits = torch.cat([sink.view(1, -1, 1, 1).expand(1, -1, LENGTH, 1), logits], -1)
        return logits.softmax(-1)[..., 1:] @ v

    report = compiled_like_eager(fn, (*qkv(), *randoms((4,))))
    assert_refused(report, ReasonKind.SOFTMAX_AXIS)
    assert "sink" in text(report)


def test_a_sink_behind_the_logits() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        logits = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~band(), -INF)
        logits = torch.cat([logits, sink.view(1, -1, 1, 1).expand(1, -1, LENGTH, 1)], -1)
        return logits.softmax(-1)[..., :-1] @ v

    report = compiled_like_eager(fn, (*qkv(), *randoms((4,))))
    assert_refused(report, ReasonKind.SOFTMAX_AXIS)
    assert "sink" in text(report)


def test_a_null_key_before_selected_blocks() -> None:
    """Blocks of several keys that start at key 1: that is no selection of single tokens."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = F.pad(blocks(q, k), (1, 0), value=True)
        k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))
        return (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~visible, -INF).softmax(-1) @ v

    report = compiled_like_eager(fn, qkv())
    assert_refused(report, ReasonKind.MASK)
    assert "start at key 1" in text(report)


def test_a_last_block_that_ends_with_the_sequence() -> None:
    """The last query sees the last, partial block of compressed keys; with the op's rule it would not."""
    n, count = LENGTH - 2, LENGTH // BLOCK

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        small_k, small_v = (F.pad(x, (0, 0, 0, 2)).unflatten(2, (-1, BLOCK)).mean(3) for x in (k, v))
        ends = torch.clamp((torch.arange(count) + 1) * BLOCK, max=n) - 1
        visible = ends <= torch.arange(n)[:, None]
        weights = (q @ small_k.transpose(-1, -2) * DIM**-0.5).masked_fill(~visible, -1e30).softmax(-1)
        return torch.where(visible.any(-1, keepdim=True), weights, 0.0) @ small_v

    report = compiled_like_eager(fn, qkv(n))
    assert_refused(report, ReasonKind.MASK)
    assert f"query {n - 1}" in str(only_site(report).counterexample)
