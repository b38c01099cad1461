"""What the report calls sites that are not rewritten, and which products of probabilities are no sites."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsa_compile.report import ReasonKind, Verdict

from .end_to_end import LENGTH, band, compiled_like_eager, only_site, qkv, why

POSITIONS = torch.arange(LENGTH)


def triangle() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


CAUSAL: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ReasonKind]] = {
    "a fill that leaks": (lambda q, k, v: scores(q, k).masked_fill(~triangle(), -1e4).softmax(-1) @ v, ReasonKind.FILL),
    "a slope": (
        lambda q, k, v: (scores(q, k) + q[..., :1] * torch.arange(LENGTH)).masked_fill(~triangle(), -math.inf).softmax(-1) @ v,
        ReasonKind.LOGITS,
    ),
    "a soft cap": (
        lambda q, k, v: (30 * torch.tanh(scores(q, k) / 30)).masked_fill(~triangle(), -math.inf).softmax(-1) @ v,
        ReasonKind.LOGITS,
    ),
    "by hand, plus a half": (
        lambda q, k, v: (e := (scores(q, k).exp() * triangle())) / (e.sum(-1, keepdim=True) + 0.5) @ v,
        ReasonKind.LOGITS,
    ),
}


@pytest.mark.parametrize("name", CAUSAL, ids=lambda n: n.replace(" ", "_"))
def test_full_causal_attention_that_is_refused_is_called_causal(name: str) -> None:
    fn, kind = CAUSAL[name]
    site = only_site(compiled_like_eager(fn, qkv()))
    assert (site.role, site.verdict) == ("causal", Verdict.REFUSED)
    assert site.reason is not None and site.reason.kind is kind, site.reason


def test_dropout_hides_no_triangle() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(scores(q, k).masked_fill(~triangle(), -math.inf).softmax(-1), 0.999999, True) @ v * 0.0

    site = only_site(compiled_like_eager(fn, qkv()))
    assert site.role == "causal" and site.reason is not None and site.reason.kind is ReasonKind.DROPOUT


def test_another_mask_is_not_called_causal() -> None:
    site = only_site(compiled_like_eager(lambda q, k, v: scores(q, k).masked_fill(~band(), -1e4).softmax(-1) @ v, qkv()))
    assert (site.role, site.verdict) == ("unknown", Verdict.REFUSED)


def test_full_attention_is_called_full() -> None:
    site = only_site(compiled_like_eager(lambda q, k, v: scores(q, k).softmax(-1) @ v, qkv()))
    assert (site.role, site.verdict) == ("full", Verdict.LEFT)


def overlap(rows: int, columns: int) -> Tensor:
    return (torch.arange(rows)[:, None] // (rows // columns) == torch.arange(columns)).float()


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, m: p @ m,
    "einsum": lambda p, m: torch.einsum("bhic,cm->bhim", p, m) ** 2,
    "expanded": lambda p, m: torch.matmul(p, m.expand(*p.shape[:2], *m.shape)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_probabilities_times_numbers_are_scores(name: str) -> None:
    """They are reported with what they choose, if with anything."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = scores(q, k).masked_fill(~triangle(), -math.inf).softmax(-1)
        return PRODUCTS[name](p, overlap(LENGTH, 4)) * v[..., :4]

    assert compiled_like_eager(fn, qkv()).sites == ()


def test_probabilities_times_a_parameter_are_attention() -> None:
    """A table of values that is learned is not a number."""
    inputs = (*qkv()[:2], torch.randn(LENGTH, 8, generator=torch.Generator().manual_seed(1)).requires_grad_())
    report = compiled_like_eager(lambda q, k, t: scores(q, k).masked_fill(~triangle(), -math.inf).softmax(-1) @ t, inputs)
    assert len(report.sites) == 1, why(report)
