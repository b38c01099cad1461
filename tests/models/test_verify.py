"""Real models under `options={"verify": True}`: every site and the whole graph agree with eager on the first call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .harness import Subject, run_compiled
from .subjects import dense_nsa, lucidrains_layer, minimax_m3


@pytest.mark.parametrize(
    "make, sites",
    [
        (dense_nsa, 3),
        (lambda: dense_nsa().to(torch.bfloat16), 3),
        (lucidrains_layer, 3),
        (lambda: minimax_m3("sdpa"), 2),
    ],
    ids=["dense NSA", "dense NSA in bfloat16", "lucidrains", "MiniMax-M3"],
)
def test_the_first_call_agrees_with_eager(make: Callable[[], Subject], sites: int) -> None:
    _, report = run_compiled(make(), verify=True, inner="eager")
    assert report.rewritten == sites
    (note,) = report.notes
    assert f"first call compared with eager: {sites} sites" in note and "outputs and gradients" in note
