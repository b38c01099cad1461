"""Python floats of a model become inputs under ``dynamic=True``; their values are read, and guarded."""

from __future__ import annotations

import torch
from torch import nn, Tensor

import fsa_compile

from .end_to_end import band, OPTIONS, qkv, TOLERANCE


class Window(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q @ k.transpose(-1, -2)) * self.scale
        return logits.masked_fill(~band(q.shape[2]), float("-inf")).softmax(-1) @ v


def test_scale_that_changes_between_calls() -> None:
    torch._dynamo.reset()
    model, inputs = Window(0.25), qkv()
    compiled = torch.compile(model, backend="fsa", dynamic=True, options=OPTIONS)
    for scale in (0.25, 0.75):
        model.scale = scale
        ours, theirs = compiled(*inputs), model(*inputs)
        report = fsa_compile.last_report()
        assert report.rewritten == len(report.sites) > 0, report
        assert {s.parameters["scale"] for s in report.graphs[-1].sites} == {scale}
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
