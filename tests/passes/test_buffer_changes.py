"""Masks that change after the compilation: the change is seen, however it is made, and compiled code gives what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fsa_compile
from fsa_compile import checked
from fsa_compile.checked import Check, CheckedCall

from .end_to_end import OPTIONS, WINDOW, assert_rewritten, assert_same, band, outcome, why
from .kept import (
    BAND, CAPACITY, MATTERS, ZERO_OR_INF, Checkpointed, J, Kept, compiled, filled, flipped, inputs_for, largest_difference,
)  # fmt: skip


def replace_data(m: Any, new: Tensor) -> None:
    m.mask.data = new


def write_behind(m: Any, new: Tensor) -> None:
    m.mask.data.copy_(new)


def write_by_numpy(m: Any, new: Tensor) -> None:
    m.mask.numpy()[:] = new.numpy()


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "copy_": lambda m, new: m.mask.copy_(new),
    "index": lambda m, new: m.mask.__setitem__(slice(None), new),
    "load_state_dict": lambda m, new: m.load_state_dict({"mask": new}),
    "load_state_dict, assigned": lambda m, new: m.load_state_dict({"mask": new.clone()}, assign=True),
    "another tensor": lambda m, new: setattr(m, "mask", new.clone()),
    "data replaced": lambda m, new: replace_data(m, new.clone()),
    "written through data": write_behind,
    "written through numpy": write_by_numpy,
    "written through a view": lambda m, new: m.mask.view(-1).copy_(new.reshape(-1)),
    "set_": lambda m, new: m.mask.set_(new.clone()),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_after_compiling_is_seen(how: str, caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = Kept(BAND.clone(), filled), inputs_for(filled)
    call = compiled(module)
    before = outcome(call, inputs)
    assert_same(before, outcome(module, inputs))
    assert_rewritten(fsa_compile.last_report())

    CHANGES[how](module, band(CAPACITY, WINDOW + 1))
    wider = outcome(module, inputs)
    assert largest_difference(before, wider) >= MATTERS
    assert_same(outcome(call, inputs), wider)
    text = "self.mask changed after the compilation, which relied on it: the graph runs as it was written"
    assert fsa_compile.last_report().notes == (text,) and [r.getMessage() for r in caplog.records].count(text) == 1

    CHANGES[how](module, BAND)
    assert_same(outcome(call, inputs), before)


def test_the_same_value_elsewhere_is_no_change() -> None:
    module, inputs = Kept(BAND.clone(), filled), inputs_for(filled)
    call = compiled(module)
    outcome(call, inputs)
    module.mask = BAND.clone()
    assert_same(outcome(call, inputs), outcome(module, inputs))
    assert not fsa_compile.last_report().notes


def test_changes_between_calls_with_a_dynamic_length() -> None:
    module, wider = Kept(BAND.clone(), filled), band(CAPACITY, WINDOW + 1)
    call = compiled(module)
    for n, mask in ((32, BAND), (48, BAND), (48, wider), (40, wider), (40, BAND), (24, BAND)):
        module.mask.copy_(mask)
        q, k, v = (t.detach().expand(2, -1, -1, -1).contiguous() for t in inputs_for(filled, n))
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 2)
        torch.testing.assert_close(call(q, k, v), module(q, k, v), rtol=1e-5, atol=1e-5)
    report = fsa_compile.last_report()
    assert len(report.graphs) == 1 and report.rewritten == 1, why(report)


class Autocast(Kept):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(q, k, v)


@pytest.mark.parametrize(("kind", "traced"), [(Kept, True), (Checkpointed, False), (Autocast, False)])
def test_what_runs_after_a_change(kind: Callable[..., nn.Module], traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept graph is compiled like any other, unless it holds what Dynamo may not take twice: then it runs as it is."""
    module, inputs = kind(BAND.clone(), filled), inputs_for(filled)
    call = compiled(module)
    outcome(call, inputs)
    handed: list[torch.fx.GraphModule] = []
    hand_over = fsa_compile.backend._hand_over
    monkeypatch.setattr(fsa_compile.backend, "_hand_over", lambda gm, *a: handed.append(gm) or hand_over(gm, *a))
    module.mask.copy_(band(CAPACITY, WINDOW + 1))
    for _ in range(2):
        assert_same(outcome(call, inputs), outcome(module, inputs))
    assert len(handed) == traced
    assert not any("fsa" in str(n.target) for gm in handed for n in gm.graph.nodes)


# -- the check itself
def check_of(t: Tensor) -> Check:
    return Check(0, "mask", t.clone(), t)


def test_the_check_compares_every_element() -> None:
    t = BAND.clone()
    check = check_of(t)
    assert check.holds(t) and check.holds(t.clone())
    for other in (BAND.float(), BAND[:-1], BAND[None], flipped(BAND), BAND.float().requires_grad_(), nn.Parameter(BAND.float())):
        assert not check.holds(other)
    t.data[7, 7] = False
    assert not check.holds(t)


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.mT, lambda t: t[1:, :7], lambda t: t.view(-1)[3:], lambda t: t[:0]])
def test_words_are_equal_when_values_are(view: Callable[[Tensor], Tensor]) -> None:
    for t in (BAND, ZERO_OR_INF, J, torch.tensor(0.5).expand(4, 8), torch.ones(8, 8, dtype=torch.bfloat16)):
        a, b = view(t) if t.dim() == 2 else t, view(t.clone()) if t.dim() == 2 else t.clone()
        assert torch.equal(*checked.in_words(a, b))
        if a.numel():
            b = b.clone()
            last = (-1,) * b.dim()
            b[last] = ~b[last] if b.dtype == torch.bool else 7
            assert not torch.equal(*checked.in_words(a, b))


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are treated like those on CUDA, where the host must not wait for elements."""
    monkeypatch.setattr(checked, "_at_hand", lambda t: False)


def test_far_away_the_host_compares_only_what_torch_knows_to_have_changed(far: None, monkeypatch: pytest.MonkeyPatch) -> None:
    t = BAND.clone()
    check = check_of(t)
    waits = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: waits.append(1) or equal(a, b))
    assert check.holds(t) and check.holds(t) and not waits
    t.copy_(BAND)
    assert check.holds(t) and len(waits) == 1
    assert check.holds(t) and len(waits) == 1, "the new version is remembered"
    assert check.holds(t.clone()) and len(waits) == 2
    t[7, 7] = False
    assert not check.holds(t) and not check.holds(t), "a wrong value is not remembered"


def test_far_away_a_hidden_change_is_an_error(far: None) -> None:
    t = BAND.clone()
    check = check_of(t)
    t.data[7, 7] = False
    with pytest.raises(RuntimeError, match="changed behind torch's back"):
        check.holds(t)


def test_far_away_inference_tensors_are_always_compared(far: None) -> None:
    """They count no versions."""
    with torch.inference_mode():
        t = BAND.clone()
        check = check_of(t)
        assert check.holds(t)
        t[7, 7] = False
        assert not check.holds(t)


def test_a_call_is_reported_once_for_each_change() -> None:
    t, said = BAND.clone(), []
    call = CheckedCall(lambda m: "compiled", lambda m: "original", [check_of(t)], said.append)
    assert call(t) == "compiled"
    t[7, 7] = False
    assert [call(t), call(t)] == ["original", "original"] and said == [("mask",)]
    t[7, 7] = True
    assert call(t) == "compiled"
    t[7, 7] = False
    assert call(t) == "original" and said == [("mask",)] * 2


def test_the_model_is_not_copied_into_the_compiled_code() -> None:
    """What is kept for the check is a copy of the value: the buffer itself can go."""
    module = Kept(BAND.clone(), filled)
    call = compiled(module)
    outcome(call, inputs_for(filled))
    twin = copy.deepcopy(module)
    twin.mask.copy_(band(CAPACITY, WINDOW + 1))
    other = torch.compile(twin, backend="fsa", options=OPTIONS)
    for ours, theirs in ((other, twin), (call, module)):
        assert_same(outcome(ours, inputs_for(filled)), outcome(theirs, inputs_for(filled)))
