"""Factors of whole rows of logits, in float64: output and all gradients, that of the factor included, against eager.

Float64 sums over at most 32 keys stay below 1e-14; a factor that is lost, or its gradient, shows at 1e-1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fsa_compile
from fsa_compile.passes.rewrite import Rewriter
from fsa_compile.report import ReasonKind, Verdict

from .end_to_end import (
    BATCH, DIM, HEADS, KV_HEADS, LENGTH, assert_refused, assert_rewritten, band, compiled_like_eager, only_site, qkv, why,
)  # fmt: skip

TOLERANCE = 1e-12
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def doubles(*shape: int, kv_heads: int = HEADS) -> tuple[Tensor, ...]:
    """q, k, v and a factor of `shape`."""
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    return (*(t.detach().double().requires_grad_() for t in qkv(kv_heads=kv_heads)), factor)


def windowed(logits: Tensor, v: Tensor, fill: float = -torch.inf) -> Tensor:
    return logits.masked_fill(~band(), fill).softmax(-1) @ v


def added(logits: Tensor, fill: float) -> Tensor:
    return logits + torch.zeros(band().shape, dtype=logits.dtype).masked_fill(~band(), fill)


REWRITTEN: dict[str, tuple[Attention, tuple[int, ...]]] = {
    "a number": (lambda q, k, v, t: windowed(q @ k.mT * t, v), ()),
    "a number, as a tensor of one element": (lambda q, k, v, t: windowed(q @ k.mT * t, v), (1,)),
    "of a divisor": (lambda q, k, v, t: windowed(q @ k.mT / t, v), ()),
    "of an exponential, with a constant": (lambda q, k, v, t: windowed(0.3 * (q @ k.mT * t.exp()), v), ()),
    "of a head": (lambda q, k, v, t: windowed(q @ k.mT * t, v), (HEADS, 1, 1)),
    "of a head, in front": (lambda q, k, v, t: windowed(t[:, None, None] * (q @ k.mT), v), (HEADS,)),
    "of a query": (lambda q, k, v, t: windowed(q @ k.mT * t, v), (LENGTH, 1)),
    "of a batch row, head and query": (lambda q, k, v, t: windowed(q @ k.mT / (t * t + 0.5), v), (BATCH, HEADS, LENGTH, 1)),
    "two of them": (lambda q, k, v, t: windowed(q @ k.mT * t / t.exp().mean(), v), (HEADS, 1, 1)),
    "before the maximum": (lambda q, k, v, t: windowed((q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)) * t, v), ()),
    "before an added mask": (lambda q, k, v, t: added(q @ k.mT * t, -torch.inf).softmax(-1) @ v, ()),
    "before a finite mask": (lambda q, k, v, t: windowed(q @ k.mT * t, v, -1e9), ()),
    "made of the queries": (lambda q, k, v, t: windowed(q @ k.mT / q.norm(dim=-1, keepdim=True) * t, v), ()),
    "a product of the queries": (lambda q, k, v, t: windowed(q @ k.mT * (q @ t), v), (DIM, 1)),
    "without a gradient": (lambda q, k, v, t: windowed(q @ k.mT * t.detach(), v) + 0 * t, ()),
    "of another dtype": (lambda q, k, v, t: windowed(q @ k.mT * t.float(), v), ()),
    "in einsum": (lambda q, k, v, t: windowed(torch.einsum("bhid,bhjd,h->bhij", q, k, t), v), (HEADS,)),
    "on the queries of SDPA": (lambda q, k, v, t: F.scaled_dot_product_attention(q * t, k, v, band(), scale=1.0), (HEADS, 1, 1)),
}

REFUSED: dict[str, tuple[Attention, tuple[int, ...]]] = {
    "of a key": (lambda q, k, v, t: windowed(q @ k.mT * t, v), (LENGTH,)),
    "after the mask": (lambda q, k, v, t: (q @ k.mT).masked_fill(~band(), -torch.inf).mul(t.abs()).softmax(-1) @ v, ()),
    "after a finite mask": (lambda q, k, v, t: (q @ k.mT).masked_fill(~band(), -1e9).mul(t).softmax(-1) @ v, ()),
    "after an added mask": (lambda q, k, v, t: added(q @ k.mT, -1e9).div(t).softmax(-1) @ v, ()),
    "twice after the mask": (lambda q, k, v, t: (q @ k.mT).masked_fill(~band(), -1e9).mul(t).mul(t).softmax(-1) @ v, ()),
    "on one of two products": (lambda q, k, v, t: windowed(q @ k.mT * t + q @ k.mT, v), ()),
    "on some of the keys": (lambda q, k, v, t: windowed(torch.where(band().roll(3, 1), q @ k.mT * t, q @ k.mT), v), ()),
    "below the fraction bar": (lambda q, k, v, t: windowed(t / (q @ k.mT), v), ()),
}


@pytest.mark.parametrize("name", REWRITTEN, ids=lambda n: n.replace(" ", "_"))
def test_a_factor_of_whole_rows_is_put_onto_the_queries(name: str) -> None:
    fn, shape = REWRITTEN[name]
    report = compiled_like_eager(fn, doubles(*shape), tolerance=TOLERANCE)
    assert_rewritten(report)
    (check,) = only_site(report).checks
    assert check.error is not None, check.text


@pytest.mark.parametrize("name", REFUSED, ids=lambda n: n.replace(" ", "_"))
def test_another_factor_is_refused(name: str) -> None:
    fn, shape = REFUSED[name]
    assert_refused(compiled_like_eager(fn, doubles(*shape), tolerance=TOLERANCE), ReasonKind.LOGITS)


def test_grouped_heads_and_chunks_read_it_where_they_stand() -> None:
    """(hkv, g, n) factors of queries in chunks of 8, which see their own chunk and the one before."""

    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        b, h, n, d = q.shape
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1).unflatten(2, (-1, 8)) for x in (k, v))
        k, v = (torch.cat([torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2), x], 3) for x in (k, v))
        logits = q.unflatten(2, (-1, 8)) @ k.mT * t.flatten(0, 1).unflatten(1, (-1, 8)).unsqueeze(-1)
        place = torch.arange(n).view(-1, 8)
        key = place[:, :1] - 8 + torch.arange(16)
        seen = (key[:, None] <= place[..., None]) & (place[..., None] - key[:, None] < 8) & (key >= 0)[:, None]
        return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v).flatten(2, 3)

    inputs = doubles(KV_HEADS, HEADS // KV_HEADS, LENGTH, kv_heads=KV_HEADS)
    assert_rewritten(compiled_like_eager(fn, inputs, tolerance=TOLERANCE))


def test_a_factor_that_is_written_afterwards_is_refused() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        t = t.exp()
        out = windowed(q @ k.mT * t, v)
        return out + t.add_(1.0).sum()

    def written_before(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        t = t.exp()
        logits = q @ k.mT * t
        t.detach().zero_()
        return windowed(logits, v)

    assert_refused(compiled_like_eager(fn, [t.detach() for t in doubles()], tolerance=TOLERANCE), ReasonKind.OPERANDS)
    for t in (doubles(), [t.detach() for t in doubles()]):
        torch._dynamo.reset()
        report = None
        try:
            report = compiled_like_eager(written_before, t, tolerance=TOLERANCE)
        except RuntimeError as error:  # eager itself: the factor is needed for its gradient
            assert "modified by an inplace operation" in str(error)
        assert report is None or only_site(report).verdict is Verdict.REFUSED, why(report)


def test_without_a_grad_mode_of_its_own() -> None:
    """The factor is applied without gradients: nothing flows to it, nor to q and k."""

    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            logits = q @ k.mT * t
        return windowed(logits, v)

    assert_refused(compiled_like_eager(fn, doubles(), tolerance=TOLERANCE))


def test_a_row_without_keys_gives_the_factor_no_gradient() -> None:
    """-inf by `masked_fill`: NaN for the values, 0 for q, k and the factor, as in eager."""

    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        ends = torch.arange(3, LENGTH + 1, 4)
        small_k, small_v = (x.unflatten(2, (-1, 4)).mean(3) for x in (k, v))
        visible = ends <= torch.arange(LENGTH)[:, None]
        return (q @ small_k.mT * t).masked_fill(~visible, -torch.inf).softmax(-1) @ small_v

    report = compiled_like_eager(fn, doubles(HEADS, 1, 1), tolerance=TOLERANCE)
    assert_rewritten(report, "compressed")
    assert only_site(report).parameters["empty_rows"] == "nan"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * DIM, 3 * HEADS * DIM, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        return x + windowed(q @ k.mT * self.temperature, v).transpose(1, 2).flatten(2)


def test_each_of_equal_layers_has_its_own() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(Layer() for _ in range(3)))
        x = torch.randn(BATCH, LENGTH, HEADS * DIM, dtype=torch.float64)

    def gradients(run: Callable[[Tensor], Any]) -> list[Tensor]:
        return list(torch.autograd.grad(run(x).square().sum(), list(model.parameters())))

    torch._dynamo.reset()
    options = {"inner": "aot_eager", "profit": "always", "strict": True}
    compiled = torch.compile(model, backend="fsa", fullgraph=True, options=options)
    got = gradients(compiled)
    report = fsa_compile.last_report()
    assert [s.verdict for s in report.sites] == 3 * [Verdict.REWRITTEN], why(report)
    for a, b in zip(got, gradients(model), strict=True):
        assert (a - b).norm() <= TOLERANCE * b.norm().clamp(min=1.0)


@pytest.mark.parametrize("change", ["no gradient", "another factor"])
def test_the_second_line_sees_the_factor(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Rewriter._at_temperature

    def lie(self: Rewriter, q: Any, *rest: Any) -> Any:
        right = honest(self, q, *rest)
        return right.detach() + q - q.detach() if change == "no gradient" else right * 1.001

    monkeypatch.setattr(Rewriter, "_at_temperature", lie)
    fn, shape = REWRITTEN["of a head"]
    report = compiled_like_eager(fn, doubles(*shape), tolerance=TOLERANCE, strict=False)
    assert_refused(report, ReasonKind.DIFFERENTIAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wider_factor_rounds_no_more_than_the_model(dtype: torch.dtype) -> None:
    """A float32 factor of bfloat16 queries: the error against float64 is at most twice eager's."""
    *wide, t = doubles(HEADS, 1, 1)
    narrow = [x.detach().to(dtype) for x in wide]
    factor = t.detach().float()

    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return windowed((q @ k.mT).float() * t, v.float())

    def wide_product(q: Tensor, k: Tensor) -> Tensor:
        return q.double() @ k.double().mT

    exact = windowed(wide_product(*narrow[:2]) * factor.double(), narrow[2].double())
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "profit": "always", "strict": True}
    got = torch.compile(fn, backend="fsa", fullgraph=True, options=options)(*narrow, factor)
    assert_rewritten(fsa_compile.last_report())
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 2 * (fn(*narrow, factor) - exact).norm() + 1e-6 * exact.norm()
