"""The example layer, the most common spelling: every branch is a dense mask over all keys, all three are rewritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsa_compile

from .harness import Trial, assert_bfloat16_as_exact_as_baseline, assert_same, by_module, compare
from .subjects import dense_nsa, dense_nsa_example

ALL = {"": ["compressed", "selected", "sliding_window"]}


@pytest.fixture(scope="module")
def trial() -> Trial:
    return compare(dense_nsa())


def test_all_three_branches_are_rewritten(trial: Trial) -> None:
    assert by_module(trial.report) == ALL
    assert len(trial.report.sites) == 3 and len(trial.report.graphs) == 1


def test_the_parameters_are_the_layers(trial: Trial) -> None:
    found = {site.role: site.parameters for site in trial.report.sites}
    assert (found["compressed"]["stride"], found["compressed"]["last"], found["compressed"]["prefix"]) == (4, 7, 0)
    assert (found["selected"]["block_size"], found["selected"]["top_k"], found["selected"]["rule"]) == (16, 4, "causal")
    assert found["sliding_window"]["window"] == 32


def test_it_equals_eager(trial: Trial) -> None:
    assert_same(trial.compiled, trial.eager)


def test_in_bfloat16() -> None:
    report = assert_bfloat16_as_exact_as_baseline(dense_nsa())
    assert by_module(report) == ALL


def test_the_example_runs_as_a_script() -> None:
    path = Path(dense_nsa_example().__file__ or "")
    command = [sys.executable, str(path), "--length", "512", "--repeats", "1", "--inner", "aot_eager"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "times faster" in done.stdout and "attention sites" in done.stderr


def test_scores_in_bfloat16_are_fused() -> None:
    """The overlaps of keys and blocks are integers that bfloat16 holds, although their ingredients, positions, are not."""
    torch.manual_seed(0)
    model = dense_nsa_example().DenseNSA(dim=64, heads=4, kv_heads=2, dim_head=16, block=64, topk=6, window=64).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fsa", options={"inner": "eager", "profit": "always", "strict": True})
    with torch.no_grad():
        compiled(torch.randn(1, 1024, 64, dtype=torch.bfloat16))
    selections = [s.selection for s in fsa_compile.last_report().sites if s.role == "selected"]
    assert [s.fused for s in selections] == [True], selections
