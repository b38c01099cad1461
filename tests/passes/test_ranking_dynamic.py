"""Selections under dynamic=True: fused for all lengths at once, and slips of the pen left as without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fsa_compile
from fsa_compile.report import Selection, Verdict

from .end_to_end import OPTIONS, TOLERANCE
from .scorings import Layer, LENGTH, Scoring, SCORINGS
from .test_ranking import gradients

FEW = {"inner": "eager"}
"""Forward only, which is what chooses blocks."""
LENGTHS = (LENGTH, 160, 80)
WITHOUT_A_LENGTH = (
    "group_sum", "group_mean_hidden_future", "einsum_of_group", "starts_in_block", "minus_one_for_none",
    "own_appended", "own_in_front", "huge_scores",
)  # fmt: skip
"""The others have `LENGTH` in their code, which makes it the only one."""
SLIPS = {f"{name}.{slip}": s for name in WITHOUT_A_LENGTH for slip, s in SCORINGS[name].slips.items()}


def layer(scoring: Scoring) -> Layer:
    torch.manual_seed(0)
    return Layer(scoring)


def sequence(n: int) -> torch.Tensor:
    """Of a batch that is no other size: equal sizes are one symbol to Dynamo."""
    return 4 * torch.randn(3, n, 32, generator=torch.Generator().manual_seed(n))


def selections() -> list[Selection | None]:
    """By graph, in order."""
    report = fsa_compile.last_report()
    sites = [next((s for s in g.sites if s.role == "selected"), g.sites[-1]) for g in report.graphs]
    assert all(s.verdict is Verdict.REWRITTEN or s.selection is None for s in sites)
    return [s.selection for s in sites]


def assert_like_eager(model: nn.Module, compiled: nn.Module, x: torch.Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        ours, theirs = [compiled(x)], [model(x)]
    if grad:
        ours += gradients(model, ours[0])
        theirs += gradients(model, theirs[0])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= TOLERANCE * b.norm()


@pytest.mark.parametrize("name", WITHOUT_A_LENGTH)
def test_scoring_of_the_op_is_fused_at_every_length(name):
    model = layer(SCORINGS[name])
    torch._dynamo.reset()
    grad = name == "group_sum"
    compiled = torch.compile(model, backend="fsa", dynamic=True, fullgraph=True, options=OPTIONS if grad else {**OPTIONS, **FEW})
    for n in LENGTHS:
        assert_like_eager(model, compiled, sequence(n), grad)
    (selection,) = selections()
    assert selection.fused, selection.reason
    assert all(check.error is not None for check in selection.checks)


@pytest.mark.parametrize("name", SLIPS)
def test_slip_keeps_the_list_of_the_model_at_every_length(name):
    model = layer(SLIPS[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fsa", dynamic=True, fullgraph=True, options={**OPTIONS, **FEW})
    for n in LENGTHS[:2]:
        assert_like_eager(model, compiled, sequence(n), False)
    assert not any(s is not None and s.fused for s in selections())
