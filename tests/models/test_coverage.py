"""The verdicts of `benchmarks/coverage/expected.md`: that the table is whole, and that models of PyPI packages get them.

Settings that the other files of this folder test in depth are left to those.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.coverage import expected, public, pypi, trial

ELSEWHERE = {
    "lucidrains SparseAttention, causal",
    "lucidrains SparseAttention, causal, per query head",
    "lucidrains SparseAttention, causal, diff top-k",
    "lucidrains SparseAttention, not causal",
    "lucidrains Transformer, causal",
    "MiniMax-M3, eager",
    "MiniMax-M3, sdpa",
}
"""Tested in `test_lucidrains` and `test_minimax_m3`, more closely."""

DOES_NOT_RUN = {name for name in pypi.MODELS if name.startswith("lucidrains Transformer, not causal")} | {"fla-core naive_nsa"}
"""The Transformer asks its layers for a cache, which they give with causality only; `naive_nsa` pools its keys in Triton."""

BETWEEN = {
    "lucidrains SparseAttention, not causal, per query head",
    "lucidrains SparseAttention, not causal, diff top-k",
    "lucidrains Transformer, causal, per query head",
    "lucidrains Transformer, causal, diff top-k",
}
"""Settings that differ in one way from one that is tested and in another way from another; the program runs them."""

HERE = [name for name in pypi.MODELS if name not in ELSEWHERE | BETWEEN | DOES_NOT_RUN]


def build(name: str) -> trial.Case:
    try:
        return pypi.MODELS[name]()
    except trial.NotRun as reason:
        pytest.skip(str(reason))


def test_every_model_has_rows_and_every_row_a_model() -> None:
    rows = expected.read()
    assert {row.model for row in rows} == {*pypi.MODELS, *public.MODELS} - DOES_NOT_RUN
    assert len({(row.model, row.branch) for row in rows}) == len(rows)


def test_every_row_that_is_not_rewritten_names_its_reasons() -> None:
    for row in expected.read():
        assert bool(row.reasons) == bool(row.verdicts & {"refused", "left"}), row
        assert row.why, row


def test_a_site_belongs_to_the_first_row_that_holds_its_line() -> None:
    dense, sparse = expected.of_model("MiniMax-M3, sdpa")
    site = {"source": "sdpa_attention.py:193", "module": "layers.1.self_attn", "verdict": "refused", "reason": {"kind": "mask"}}
    (first, second), others = expected.outcomes((dense, sparse), [site, {**site, "source": "elsewhere.py:193"}])
    assert first.sites == () and second.sites == (site,) and len(others) == 1
    assert not first.held and not second.held  # a row without a site, a site with another verdict


def test_another_reason_is_not_as_expected() -> None:
    (row,) = expected.of_model("DeepSeek-V3.2, eager")
    site = {"source": row.where.split("-")[0], "module": "", "verdict": "refused", "reason": {"kind": "token_level"}}
    assert expected.outcomes((row,), [site])[0][0].held
    assert not expected.outcomes((row,), [{**site, "reason": {"kind": "mask"}}])[0][0].held


@pytest.mark.parametrize("name", HERE)
def test_verdicts_and_results(name: str) -> None:
    result = trial.run(build(name))
    assert not result["eager"] and not result["fault"]
    outcomes, others = expected.outcomes(expected.of_model(name), result["sites"])
    assert not others
    assert [outcome.row.branch for outcome in outcomes if not outcome.held] == []
    assert result["difference"] <= trial.TOLERANCE, result["worst"]


@pytest.mark.parametrize("name", sorted(DOES_NOT_RUN))
def test_what_does_not_run_fails_in_eager_too(name: str) -> None:
    """Otherwise it would be missing from the table for no reason."""
    assert trial.run(build(name))["eager"]
