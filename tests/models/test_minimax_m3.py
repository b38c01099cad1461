"""MiniMax-M3's text model of transformers: per-query block selection as an additive mask, through matmuls or SDPA.

The graph without a cache holds ``cumsum(diff(position_ids) != 1)``, which looks for packed documents: it is proven to find
none. The first layer is dense and stays with the inner compiler. The inner compiler is `aot_eager` to keep this in seconds.
"""

from __future__ import annotations

import pytest

from fsa_compile.report import Verdict

from .harness import Trial, assert_bfloat16_as_exact_as_baseline, assert_same, by_module, compare
from .subjects import minimax_m3

SPARSE = {"layers.1.self_attn": ["selected"], "layers.2.self_attn": ["selected"]}
DENSE = {"layers.0.self_attn": ["causal"]}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def trial(request: pytest.FixtureRequest) -> Trial:
    return compare(minimax_m3(request.param))


def test_both_sparse_layers_are_rewritten_and_the_dense_one_is_left(trial: Trial) -> None:
    assert by_module(trial.report) == SPARSE
    assert by_module(trial.report, Verdict.LEFT) == DENSE
    assert len(trial.report.sites) == 3 and len(trial.report.graphs) == 1


def test_the_parameters_are_the_configurations(trial: Trial) -> None:
    for site in trial.report.sites:
        if site.role == "selected":
            found = {name: site.parameters[name] for name in ("block_size", "top_k", "per", "heads", "kv_heads", "scale")}
            assert found == {"block_size": 16, "top_k": 4, "per": "kv head", "heads": 4, "kv_heads": 2, "scale": 0.25}


def test_it_equals_eager(trial: Trial) -> None:
    assert_same(trial.compiled, trial.eager)


def test_the_indexer_gets_no_gradient_either_way(trial: Trial) -> None:
    """The top-k cuts it off in the model; `assert_same` then demands that the compiled model agrees."""
    missing = [name for name, gradient in trial.eager.items() if gradient is None]
    assert missing and all("indexer" in name for name in missing)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_in_bfloat16(implementation: str) -> None:
    report = assert_bfloat16_as_exact_as_baseline(minimax_m3(implementation))
    assert by_module(report) == SPARSE
