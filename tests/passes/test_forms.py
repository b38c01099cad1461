"""Forms that need one mechanism each, beyond the table in ``tests/spellings``: every one is rewritten and equal to eager.

The mechanism is named in the docstring of each function: delete it, and exactly that form is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .end_to_end import assert_refused, assert_rewritten, compiled_like_eager, randoms

B, HQ, HKV, N, D = 2, 4, 2, 48, 8
GROUP, BLOCK, TOP_K, WINDOW = HQ // HKV, 4, 3, 8
SCALE = D**-0.5


def inputs() -> tuple[Tensor, ...]:
    return randoms((B, HQ, N, D), (B, HKV, N, D), (B, HKV, N, D))


def block_scores(q: Tensor, k: Tensor) -> Tensor:
    """(b, hkv, n, blocks): the group's queries against mean keys; future blocks -inf, the own block +inf."""
    means = k.unflatten(2, (-1, BLOCK)).mean(3)
    scores = torch.einsum("bkgid,bkcd->bkic", q.unflatten(1, (HKV, GROUP)), means)
    own, block = torch.arange(N)[:, None] // BLOCK, torch.arange(N // BLOCK)
    return scores.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)


def tokens(blocks: Tensor) -> Tensor:
    """A mask over blocks as a causal mask over tokens."""
    return blocks.repeat_interleave(BLOCK, -1) & torch.ones(N, N, dtype=torch.bool).tril()


def selection(q: Tensor, k: Tensor) -> Tensor:
    """The selected tokens, (b, hq, n, n)."""
    scores = block_scores(q, k)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(TOP_K, -1).indices, True)
    return tokens(chosen).repeat_interleave(GROUP, 1)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(GROUP, 1).mT * SCALE


def values(v: Tensor) -> Tensor:
    return v.repeat_interleave(GROUP, 1)


def weights_times_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A weight of zero is a logit of -inf (`handmade.logit`)."""
    s = logits(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp() * selection(q, k)
    return e / e.sum(-1, keepdim=True) @ values(v)


def division_after_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``(e @ v) / e.sum()`` (`deferred_softmax`)."""
    e = logits(q, k).exp().masked_fill(~selection(q, k), 0)
    return torch.einsum("bhij,bhjd->bhid", e, values(v)) / e.sum(-1)[..., None]


def log_of_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The logarithm of a mask is 0 or -inf."""
    return (logits(q, k) + selection(q, k).float().log()).softmax(-1) @ values(v)


def threshold_and_list(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``score >= smallest picked score`` adds nothing to the list (`minimum_facts`)."""
    scores = block_scores(q, k)
    top = scores.topk(TOP_K, -1)
    listed = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top.indices, True)
    chosen = (scores >= top.values.min(-1, keepdim=True).values) & listed
    mask = tokens(chosen).repeat_interleave(GROUP, 1)
    return logits(q, k).masked_fill(~mask, -torch.inf).softmax(-1) @ values(v)


def nan_replaced_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``where(isnan(p), 0, p)`` is ``nan_to_num(p)``."""
    p = logits(q, k).masked_fill(~selection(q, k), -torch.inf).softmax(-1)
    return torch.where(torch.isnan(p), 0.0, p) @ values(v)


def heads_grouped_like_a_tile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head ``g * hkv + kv`` reads kv: heads as two axes in the other order (`Layout.groups`)."""
    q = q.unflatten(1, (GROUP, HKV))
    means = k.unflatten(2, (-1, BLOCK)).mean(3)
    scores = torch.einsum("bgkid,bkcd->bkic", q, means)
    own, block = torch.arange(N)[:, None] // BLOCK, torch.arange(N // BLOCK)
    scores = scores.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(TOP_K, -1).indices, True)
    s = torch.einsum("bgkid,bkjd->bgkij", q, k) * SCALE
    p = s.masked_fill(~tokens(chosen)[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bgkij,bkjd->bgkid", p, v).flatten(1, 2)


SELECTED = (
    weights_times_mask, division_after_the_values, log_of_the_mask, threshold_and_list, nan_replaced_by_where,
    heads_grouped_like_a_tile,
)  # fmt: skip


def newest_first(q: Tensor, k: Tensor, v: Tensor, step: int = -1) -> Tensor:
    """The last keys gathered one by one, clamped at the start: the key falls as the index grows (`affine_key`)."""
    position = torch.arange(N)[:, None] + step * torch.arange(WINDOW)
    there, index = (position >= 0) & (position < N), position.clamp(0, N - 1)
    keys, vals = k.repeat_interleave(GROUP, 1)[:, :, index], values(v)[:, :, index]
    s = torch.einsum("bhnd,bhnwd->bhnw", q, keys) * SCALE
    return torch.einsum("bhnw,bhnwd->bhnd", s.masked_fill(~there, -torch.inf).softmax(-1), vals)


def rows_without_a_key_by_any(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``where(mask.any(-1, keepdim=True), p, 0)`` behind the softmax (`_some_visible`); compression by slices and `stack`."""
    starts = range(0, N - 2 * BLOCK + 1, BLOCK)
    small_k, small_v = (torch.stack([x[:, :, i : i + 2 * BLOCK].mean(2) for i in starts], 2) for x in (k, v))
    visible = torch.arange(N)[:, None] >= torch.arange(small_k.shape[2]) * BLOCK + 2 * BLOCK - 1
    s = (q @ small_k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, -torch.inf)
    p = torch.where(visible.any(-1, keepdim=True), s.softmax(-1), torch.zeros_like(s))
    return p @ small_v.repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("fn", SELECTED, ids=lambda f: f.__name__)
def test_selected(fn: Callable[..., Tensor]) -> None:
    assert_rewritten(compiled_like_eager(fn, inputs()), "selected")


def test_window_newest_first() -> None:
    assert_rewritten(compiled_like_eager(newest_first, inputs()), "sliding_window")


def test_window_into_the_future_stays() -> None:
    report = compiled_like_eager(lambda q, k, v: newest_first(q, k, v, step=1), inputs())
    assert_refused(report)


def test_compressed_rows_by_any() -> None:
    assert_rewritten(compiled_like_eager(rows_without_a_key_by_any, inputs()), "compressed")


def test_threshold_alone_is_a_map_of_blocks() -> None:
    """Ties may let more blocks through than the list holds: what counts is the comparison, not the list."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = block_scores(q, k).round()
        chosen = scores >= scores.topk(TOP_K, -1).values[..., -1:]
        mask = tokens(chosen).repeat_interleave(GROUP, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    report = compiled_like_eager(fn, inputs())
    assert_rewritten(report, "selected")
    assert "top_k" not in report.sites[0].parameters


def test_unrolled_loop_is_named() -> None:
    """One query at a time: every turn is reported as the loop that it is."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for i in range(12):
            s = (q[:, :, i : i + 1] @ k.repeat_interleave(GROUP, 1).mT * SCALE).relu()
            rows.append(s.softmax(-1) @ values(v))
        return torch.cat(rows, 2)

    report = compiled_like_eager(fn, inputs())
    assert {str(s.reason and s.reason.kind) for s in report.sites} == {"unrolled_loop"} and len(report.sites) == 12
