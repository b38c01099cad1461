"""Values of tensors as expressions: what is fitted is the tensor, element by element, and what is no rule is not fitted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fsa_compile.passes import closed_form
from fsa_compile.passes import expr as x
from fsa_compile.passes.closed_form import EXCEPTIONS, ClosedForm, fit
from fsa_compile.passes.evaluate import at_point

N, B = 24, 4
INF = float("inf")
I, J, C = torch.arange(N)[:, None], torch.arange(N), torch.arange(N // B)
BAND = (J <= I) & (I - J < 7)

FORMS: dict[str, Tensor] = {
    "triangle": torch.ones(N, N).tril().bool(),
    "strict triangle": J < I,
    "triangle of float32": torch.ones(N, N).tril(),
    "triangle of uint8 with batch and head": torch.ones(N, N, dtype=torch.uint8).tril()[None, None],
    "triangle for each head": torch.ones(3, N, N).tril().bool(),
    "wide triangle": torch.ones(N, N + 5).tril(5).bool(),
    "band": BAND,
    "band, True where masked": ~BAND,
    "band into the future": (I - J).abs() < 5,
    "additive triangle": torch.full((N, N), -INF).triu(1),
    "additive band of bfloat16": torch.zeros(N, N, dtype=torch.bfloat16).masked_fill(~BAND, -1e9),
    "blocks of positions": J // B,
    "offsets in blocks": J % B,
    "ends of blocks": (C + 1) * B - 1,
    "complete blocks": (C + 1) * B - 1 <= I,
    "overlapping blocks": torch.arange(10) * 2 + 5 <= I,
    "complete blocks behind memory tokens": (torch.arange(8) < 2) | ((torch.arange(8) - 2) * B + B + 1 <= I),
    "membership": J[:, None] // B == C,
    "causal between blocks": I // B >= J // B,
    "diagonal blocks": I // B == J // B,
    "distances": I - J,
    "keys of a window, clamped": (I - 6 + torch.arange(7)).clamp(0),
    "tokens of blocks": C[:, None] * B + torch.arange(B),
    "falling": -J // 7,
    "positions of float32": J.float(),
    "threshold": J < 9,
    "one value": torch.full((2, 3), 3.5),
    "a number": torch.tensor(0.125),
    "all True": torch.ones(N, dtype=torch.bool),
}
generator = torch.Generator().manual_seed(0)
NO_FORMS: dict[str, Tensor] = {
    "noise": torch.rand(N, N, generator=generator) < 0.5,
    "reals": torch.rand(N, generator=generator),
    "NaN": torch.tensor([0.0, float("nan"), 0.0]),
    "a NaN": torch.tensor(float("nan")),
    "sinks and a band": (J < 2) | BAND,
    "documents": torch.tensor([0] * 2 + [1] * 13 + [2] * 1 + [3] * 8),
    "a permutation": torch.randperm(N, generator=generator),
    "nothing": torch.ones(0, 3),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "three dimensions": torch.rand(3, 3, 3, generator=generator) < 0.5,
}


def value_at(form: ClosedForm, at: tuple[int, ...]) -> float:
    """The expression at one point, by an evaluation of its own."""
    values = {v: c for v, c in zip(map(x.as_var, form.axes), at) if v is not None}

    def real(e: x.Expr) -> float:
        if e.op == "if_real":
            return real(e.args[1] if at_point(e.args[0], values, {}) else e.args[2])
        return e.args[0] if e.op == "const" else float(at_point(e.args[0], values, {}))

    e = form.element
    return real(e) if e.sort == x.REAL else float(at_point(e, values, {}))


def assert_is(form: ClosedForm | None, t: Tensor) -> None:
    assert form is not None
    for at in itertools.product(*map(range, t.shape)):
        assert value_at(form, at) == float(t[at]), at


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_the_tensor(name: str) -> None:
    assert_is(fit(FORMS[name]), FORMS[name])


@pytest.mark.parametrize("name", NO_FORMS)
def test_no_rule_no_form(name: str) -> None:
    assert fit(NO_FORMS[name]) is None


def test_coordinates_are_replaced() -> None:
    i, s = x.var("i", N), x.var("s", 6)
    form = fit(BAND)
    assert form is not None
    assert form.at((i, x.plus(i, x.ZERO))) is x.TRUE
    assert fit(J // B).at((x.plus(x.times(s, B), 3),)) is s  # type: ignore[union-attr]


@pytest.mark.parametrize("flip", [(0, 0), (N - 1, N - 1), (13, 2), (13, 13), (2, 20)])
@pytest.mark.parametrize("mask", ["triangle", "band", "additive triangle", "complete blocks"])
def test_a_flipped_bit_is_a_case_of_its_own(mask: str, flip: tuple[int, int]) -> None:
    t = FORMS[mask].clone()
    at = (flip[0], flip[1] % t.shape[1])
    t[at] = ~t[at] if t.dtype == torch.bool else (0.0 if t[at] else -INF)
    assert_is(fit(t), t)


def test_many_exceptions_are_no_form() -> None:
    t = torch.ones(N, N).tril().bool()
    for k in range(EXCEPTIONS + 1):
        t[4 * k + 2, 1] = False
        if k + 1 <= EXCEPTIONS:
            assert_is(fit(t), t)
    assert fit(t) is None


@pytest.mark.parametrize("change", [lambda t: t.roll(1, 0), lambda t: t.flip(1), lambda t: t.mT, lambda t: t & (I % 2 == 0)])
def test_a_near_miss_is_another_form_or_none(change: Callable[[Tensor], Tensor]) -> None:
    t = change(BAND)
    assert not torch.equal(t, BAND)
    form = fit(t)
    if form is not None:
        assert_is(form, t)


def test_every_element_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of rows too, the last of them shorter."""
    monkeypatch.setattr(closed_form, "_CHUNK", 5 * N)
    assert_is(fit(BAND), BAND)
    noise = torch.rand(N, N, generator=torch.Generator().manual_seed(1)) < 0.5
    broken = torch.ones(N, N).tril().bool()
    broken[-2:] = noise[-2:]
    assert fit(broken) is None


def test_what_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "LARGEST", N * N - 1)
    assert fit(BAND) is None
    assert fit(J) is not None
