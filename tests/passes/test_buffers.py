"""Masks that the model keeps: their value is read when compiling.

Each spelling is rewritten and has mutants of the *buffer*: the same code with another value in it, which is another function in
eager and keeps its meaning compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fsa_compile
from fsa_compile.passes import buffers as buffers_
from fsa_compile.report import ReasonKind, Verdict

from .end_to_end import (
    DIM, LENGTH, WINDOW, assert_refused, assert_rewritten, assert_same, band, compiled_like_eager, only_site, outcome, why,
)  # fmt: skip
from .kept import (
    BAND, CAPACITY, INF, MATTERS, SCALE, SPELLINGS, Checkpointed, I, J, Kept, added, compiled, filled, flipped, inputs_for,
    largest_difference,
)  # fmt: skip

each_spelling = pytest.mark.parametrize("name", SPELLINGS)


# -- what is read
@each_spelling
def test_parent_is_rewritten(name: str) -> None:
    s = SPELLINGS[name]
    report = compiled_like_eager(Kept(s.mask, s.attend), inputs_for(s.attend))
    assert_rewritten(report, s.role)
    assert [g.notes for g in report.graphs] == [("relies on the value of self.mask, which is checked at each call",)]


@pytest.mark.parametrize(("name", "mutant"), [(n, m) for n, s in SPELLINGS.items() for m in s.mutants])
def test_mutant_keeps_its_meaning(name: str, mutant: str) -> None:
    s = SPELLINGS[name]
    other, inputs = s.mutants[mutant](s.mask), inputs_for(s.attend)
    assert largest_difference(*(outcome(Kept(m, s.attend), inputs) for m in (s.mask, other))) >= MATTERS
    compiled_like_eager(Kept(other, s.attend), inputs)


def test_a_flipped_bit_is_the_counterexample() -> None:
    report = compiled_like_eager(Kept(flipped(BAND), filled), inputs_for(filled))
    assert_refused(report, ReasonKind.MASK)
    counterexample = only_site(report).counterexample
    assert counterexample is not None and (counterexample.query, counterexample.key) == (20, 17)
    assert counterexample.model_sees is False
    assert not report.graphs[0].notes, "nothing relies on the buffer"


def test_a_bit_that_no_query_reaches_is_no_obstacle() -> None:
    mask = BAND.clone()
    mask[LENGTH, 0] = True
    assert_rewritten(compiled_like_eager(Kept(mask, filled), inputs_for(filled)))


def test_noise_is_refused_by_name() -> None:
    mask = torch.rand(CAPACITY, CAPACITY, generator=torch.Generator().manual_seed(0)) < 0.5
    report = compiled_like_eager(Kept(mask | torch.eye(CAPACITY).bool(), filled), inputs_for(filled))
    assert_refused(report, ReasonKind.RUNTIME_MASK)
    reason = only_site(report).reason
    assert reason is not None and "the irregular buffer self.mask" in reason.text
    assert reason.source is not None and reason.source.startswith("kept.py:")


# -- where masks are kept
GLOBAL = BAND.clone()


def by_global(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(~GLOBAL[:n, :n], -INF).softmax(-1) @ v


def closing_over(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT * SCALE).masked_fill(~mask[:n, :n], -INF).softmax(-1) @ v

    return attend


class Plain(nn.Module):
    """Tensors that are no buffers: an attribute and an element of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.past, self.near = torch.ones(CAPACITY, CAPACITY).tril().bool(), [I - J < WINDOW]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT * SCALE).masked_fill(~(self.past[:n, :n] & self.near[0][:n, :n]), -INF).softmax(-1) @ v


@pytest.mark.parametrize(
    ("fn", "label"),
    [
        (by_global, "GLOBAL"),
        (closing_over(BAND), "mask"),
        (Plain(), "self.near[0], self.past"),
        (Checkpointed(BAND, filled), "self.mask"),
        (nn.ModuleDict({"attn": Kept(BAND, filled)})["attn"], "self.mask"),
    ],
    ids=["global", "closure", "attribute and list", "checkpoint", "module"],
)
def test_places(fn: Any, label: str) -> None:
    report = compiled_like_eager(fn, inputs_for(filled))
    assert_rewritten(report)
    assert [n for g in report.graphs for n in g.notes] == [f"relies on the value of {label}, which is checked at each call"]


def test_an_argument_is_no_buffer() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v

    report = compiled_like_eager(fn, (*inputs_for(filled), band()))
    assert_refused(report, ReasonKind.RUNTIME_MASK)
    assert "(mask)" in str(only_site(report).reason)


def test_a_parameter_is_not_read() -> None:
    """Its value moves, and it wants a gradient."""
    module = Kept(BAND, added)
    del module.mask
    module.mask = nn.Parameter(torch.zeros(CAPACITY, CAPACITY).masked_fill(~BAND, -1e9))
    assert_refused(compiled_like_eager(module, inputs_for(filled)))


def test_a_fixed_parameter_is_not_read() -> None:
    module = Kept(BAND, added)
    del module.mask
    module.mask = nn.Parameter(torch.zeros(CAPACITY, CAPACITY).masked_fill(~BAND, -1e9), requires_grad=False)
    assert_refused(compiled_like_eager(module, inputs_for(filled)))


class Writing(Kept):
    """Writes into its mask before it uses it: through the buffer itself, or through a view of it."""

    def __init__(self, how: str) -> None:
        super().__init__(BAND.clone(), filled)
        self.how, self.row = how, self.mask[3]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "buffer":
            self.mask[20, 15] = False
        elif self.how == "view":
            self.row[1] = False
        elif self.how == "data":
            self.mask.data[20, 15] = False
        else:
            self.mask.logical_and_(J != 15)
        return super().forward(q, k, v)


@pytest.mark.parametrize("how", ["buffer", "view", "data", "method"])
def test_a_buffer_that_the_graph_writes_is_not_read(how: str) -> None:
    if how == "data" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 cannot trace Tensor.data functionally: the graph is left whole, and strict raises")
    assert_refused(compiled_like_eager(Writing(how), inputs_for(filled)))


def test_one_copy_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values are read once and kept once; each buffer is checked."""
    fitted, checks = [], []
    fit, call_type = buffers_.fit, fsa_compile.backend.CheckedCall
    monkeypatch.setattr(buffers_, "fit", lambda t: fitted.append(t) or fit(t))
    monkeypatch.setattr(fsa_compile.backend, "CheckedCall", lambda c, o, ks, f: checks.extend(ks) or call_type(c, o, ks, f))

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Kept(BAND.clone(), filled) for _ in range(3))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for layer in self.layers:
                v = layer(q, k, v)
            return v

    module = Layers()
    call, inputs = compiled(module), inputs_for(filled)
    assert_same(outcome(call, inputs), outcome(module, inputs))
    assert fsa_compile.last_report().rewritten == 3
    assert len(fitted) == 1 and len(checks) == 3 and len({id(c.value) for c in checks}) == 1
    assert [c.label for c in checks] == [f"self.layers[{k}].mask" for k in range(3)]
    module.layers[1].mask[20, 15] = False
    assert_same(outcome(call, inputs), outcome(module, inputs))
    assert fsa_compile.last_report().notes[0].startswith("self.layers[1].mask changed")


def test_a_layer_whose_mask_is_an_argument_is_another_layer() -> None:
    """The same code twice: the mask is a buffer in one layer and an argument in the other, which adds the buffer."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", band(LENGTH))
            self.into = nn.Linear(DIM, DIM)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
            for mask, more in ((self.mask, other), (other, self.mask)):
                q, k, v = self.into(q), self.into(k), self.into(v)
                v = (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v + more.float().mean()
            return v

    other = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    report = compiled_like_eager(Two(), (*inputs_for(filled), other | torch.eye(LENGTH).bool()))
    assert [s.verdict for s in report.sites] == [Verdict.REWRITTEN, Verdict.REFUSED], why(report)


def test_a_graph_that_relies_on_no_buffer_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that only refused and left sites read needs no check."""
    monkeypatch.setattr(fsa_compile.backend, "CheckedCall", None)
    triangle = torch.ones(CAPACITY, CAPACITY).tril().bool()
    report = compiled_like_eager(Kept(triangle, filled), inputs_for(filled))
    assert only_site(report).verdict is Verdict.LEFT
    assert not report.graphs[0].notes


def test_explain_reads_buffers_and_keeps_them() -> None:
    module = Kept(BAND.clone(), filled)
    torch._dynamo.reset()
    report = fsa_compile.explain(module, *inputs_for(filled))
    assert only_site(report).role == "sliding_window", why(report)
    assert torch.equal(module.mask, BAND)
