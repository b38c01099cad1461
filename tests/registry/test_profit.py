"""What ``profit="auto"`` refuses: short sequences, and cases for which a device has no kernel, such as a tile that does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import fsa_compile
from fsa_compile.kernels.availability import why_no_kernel
from fsa_compile.registry import builtin
from fsa_compile.report import ReasonKind, Site, Verdict

LONG = 4096


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    mask = (i <= i[:, None]) & (i[:, None] - i < 64)
    return (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def judged(n: int, profit: str) -> Site:
    """The verdict on a window over n random tokens; analysis only."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    compiled = torch.compile(window, backend="fsa", options={"inner": "eager", "profit": profit, "proof_seconds": 60})
    compiled(q, k, v)
    (site,) = fsa_compile.last_report().sites
    return site


def test_short_sequences_stay() -> None:
    site = judged(128, "auto")
    assert site.verdict is Verdict.REFUSED and site.reason is not None and site.reason.kind is ReasonKind.UNPROFITABLE
    assert judged(128, "always").verdict is Verdict.REWRITTEN


def test_no_kernel_for_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(LONG, "auto").verdict is Verdict.REWRITTEN
    monkeypatch.setattr(builtin, "why_no_kernel", lambda *arguments: "a tile needs 300000 bytes of shared memory")
    site = judged(LONG, "auto")
    assert site.verdict is Verdict.REFUSED and site.reason is not None
    assert site.reason.kind is ReasonKind.UNPROFITABLE and "shared memory" in site.reason.text
    assert judged(LONG, "always").verdict is Verdict.REWRITTEN  # the blocked path is slow there, and right


def test_the_cpu_has_a_kernel_for_everything() -> None:
    assert why_no_kernel(torch.device("cpu"), torch.bfloat16, (8, 2), (40, 24), 16) is None


@pytest.mark.parametrize("module", ["banded_attention", "selected_attention"])
def test_a_launch_that_does_not_fit_is_known_beforehand(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the launch parameters live with the Triton kernels")
    import importlib

    kernels = importlib.import_module(f"fsa_compile.kernels.triton.{module}")
    q, k = torch.empty(1, 4, 8, 128, dtype=torch.bfloat16), torch.empty(1, 2, 8, 128, dtype=torch.bfloat16)
    arguments = (q, k, k) if module == "banded_attention" else (q, k, k, torch.zeros(1, 2, 8, 1, dtype=torch.int64), 64)
    assert kernels.supports(*arguments) is None
    real = kernels.device_of
    monkeypatch.setattr(kernels, "device_of", lambda x: dataclasses.replace(real(x), shared_memory=4096))
    why = kernels.supports(*arguments)
    assert why is not None and "shared memory" in why
