"""`SparseAttention` of PyPI's native-sparse-attention-pytorch and its `Transformer`: three branches, all rewritten.

The selected branch gathers blocks per query, appends the query's own block and drops picks below a threshold; the compressed
branch has learned memory tokens in front; the window is local-attention's chunk-and-look-back.

The inner compiler is `aot_eager` except in the one test that is marked `inductor`. There the baseline needs
``cpp.simdlen=1``: without it torch 2.13's Inductor corrupts the heap in LocalAttention's backward on CPUs.
"""

from __future__ import annotations

import pytest
import torch

from fsa_compile.report import ReasonKind, Verdict

from .harness import (
    Trial,
    assert_as_exact,
    assert_bfloat16_as_exact_as_baseline,
    assert_same,
    by_module,
    compare,
    run,
    run_compiled,
)
from .subjects import lucidrains_layer, lucidrains_transformer

LAYER = {"": ["compressed", "selected"], "sliding_window": ["sliding_window"]}
TRANSFORMER = {
    "layers.0.0": ["compressed", "selected"],
    "layers.0.0.sliding_window": ["sliding_window"],
    "layers.1.0": ["compressed", "selected"],
    "layers.1.0.sliding_window": ["sliding_window"],
}


@pytest.fixture(scope="module")
def layer() -> Trial:
    return compare(lucidrains_layer())


@pytest.fixture(scope="module")
def transformer() -> Trial:
    return compare(lucidrains_transformer())


@pytest.fixture(scope="module")
def differentiable_topk() -> Trial:
    return compare(lucidrains_layer(use_diff_topk=True))


def test_all_three_branches_of_the_layer_are_rewritten(layer: Trial) -> None:
    assert by_module(layer.report) == LAYER
    assert len(layer.report.sites) == 3 and len(layer.report.graphs) == 1


def test_the_parameters_are_the_layers(layer: Trial) -> None:
    found = {site.role: site.parameters for site in layer.report.sites}
    assert {p["heads"] for p in found.values()} == {4} and {p["scale"] for p in found.values()} == {0.25}
    compressed, selected, window = found["compressed"], found["selected"], found["sliding_window"]
    # One memory token; compressed key c stands for a block that ends before token 8c + 8.
    assert (compressed["prefix"], compressed["stride"], compressed["last"]) == (1, 8, 8)
    assert (selected["block_size"], selected["top_k"], selected["rule"]) == (16, 4, "diagonal")
    assert window["window"] == 25  # LocalAttention's exact window does not count the query itself


def test_the_layer_equals_eager(layer: Trial) -> None:
    assert_same(layer.compiled, layer.eager)


def test_the_layer_in_bfloat16() -> None:
    report = assert_bfloat16_as_exact_as_baseline(lucidrains_layer())
    assert by_module(report) == LAYER


def test_one_selection_for_each_query_head() -> None:
    trial = compare(lucidrains_layer(query_heads_share_selected_kv=False))
    assert by_module(trial.report) == LAYER
    (selected,) = (site for site in trial.report.sites if site.role == "selected")
    assert selected.parameters["per"] == "query head"
    assert_same(trial.compiled, trial.eager)


def test_every_branch_of_every_transformer_layer_is_rewritten(transformer: Trial) -> None:
    assert by_module(transformer.report) == TRANSFORMER
    assert len(transformer.report.sites) == 6 and len(transformer.report.graphs) == 1


def test_the_transformer_equals_eager(transformer: Trial) -> None:
    assert_same(transformer.compiled, transformer.eager)


def test_the_transformer_in_bfloat16() -> None:
    report = assert_bfloat16_as_exact_as_baseline(lucidrains_transformer())
    assert by_module(report) == TRANSFORMER


def test_differentiable_topk_refuses_the_selected_branch(differentiable_topk: Trial) -> None:
    """The gates are 1 in forward and carry a gradient to the scores, which the op would drop."""
    refused = [site for site in differentiable_topk.report.sites if site.verdict is Verdict.REFUSED]
    assert [site.reason.kind for site in refused if site.reason] == [ReasonKind.GRADIENT]
    assert refused[0].source.startswith("native_sparse_attention.py:")
    assert by_module(differentiable_topk.report) == {"": ["compressed"], "sliding_window": ["sliding_window"]}


def test_differentiable_topk_equals_eager(differentiable_topk: Trial) -> None:
    assert_same(differentiable_topk.compiled, differentiable_topk.eager)


def test_without_causality_every_branch_is_refused_with_a_reason() -> None:
    trial = compare(lucidrains_layer(causal=False))
    assert trial.report.sites and trial.report.rewritten == 0
    assert all(site.reason and site.reason.text and site.source != "?" for site in trial.report.sites)
    assert_same(trial.compiled, trial.eager)


@pytest.mark.inductor
def test_the_layer_in_bfloat16_under_inductor() -> None:
    case = lucidrains_layer()
    exact = run(case.to(torch.bfloat16).to(torch.float32))
    case = case.to(torch.bfloat16)
    got, report = run_compiled(case, inner="inductor")
    assert by_module(report) == LAYER
    torch._dynamo.reset()
    baseline = torch.compile(case.model, fullgraph=True, options={"cpp.simdlen": 1})
    assert_as_exact(got, run(case, baseline), exact)
