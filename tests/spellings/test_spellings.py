"""Every spelling is rewritten and right; every mutant, whatever happens to it, computes what it computed before.

The oracle is eager float32 on the same inputs. The bound of 1e-5 (norm-wise, per tensor) leaves two digits above the rounding of
float32 sums over at most 128 keys; a wrong key, weight or head shows at 1e-2 and above.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fsa_compile
from fsa_compile.report import Report, Verdict

from . import (
    additive, block_map, by_hand, codes, compressed, dense_layouts, dense_mask, gathered, incidence, layer, log_space, loops,
    named_axes, products, raised, sdpa, temperature, window,
)  # fmt: skip
from .lookalikes import LOOKALIKES, LookAlike
from .spelling import Kind, Mutant, Problem, Spelling

SEED = 2
TOLERANCE = 1e-5
FAMILIES = (
    dense_mask, block_map, codes, incidence, log_space, by_hand, dense_layouts, sdpa, gathered, products, loops, named_axes, additive,
    raised, temperature, window, compressed, layer,
)  # fmt: skip
SPELLINGS = tuple(spelling for family in FAMILIES for spelling in family.SPELLINGS)
PAIRS = tuple((spelling, mutant) for spelling in SPELLINGS for mutant in spelling.mutants)
OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True}

each_spelling = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
each_mutant = pytest.mark.parametrize("spelling, mutant", PAIRS, ids=[f"{s.name}-{m.name.replace(' ', '_')}" for s, m in PAIRS])
each_lookalike = pytest.mark.parametrize("lookalike", LOOKALIKES, ids=lambda s: s.name)


def outputs(problem: Problem, run: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    """Output of `run` and the gradients of a random functional of it, by name."""
    fn, inputs = problem
    leaves = {f"input {i}": x for i, x in enumerate(inputs)}
    if isinstance(fn, nn.Module):
        leaves |= dict(fn.named_parameters())
    out = run(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + 1))
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return {"output": out.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """Norm-wise equality of each tensor; NaN must stand in the same places."""
    for name, expected in want.items():
        actual = got[name]
        assert (actual is None) == (expected is None), name
        if expected is None or actual is None:
            continue
        assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
        expected, actual = expected.nan_to_num(0.0).double(), actual.nan_to_num(0.0).double()
        error = (actual - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, f"{name}: off by {error:.2e}"


def compiled(problem: Problem) -> tuple[dict[str, Tensor | None], Report]:
    """`outputs` under the backend, and what it reports."""
    torch._dynamo.reset()
    got = outputs(problem, torch.compile(problem[0], backend="fsa", fullgraph=True, options=OPTIONS))
    return got, fsa_compile.last_report()


def rewritten(report: Report) -> list[str]:
    """Roles of the rewritten sites, sorted."""
    return sorted(site.role for site in report.sites if site.verdict is Verdict.REWRITTEN)


def why(report: Report) -> str:
    """The verdicts, for the message of a failing test."""
    return "; ".join(f"{s.role} {s.verdict} {s.source}: {s.reason} {s.counterexample or ''}" for s in report.sites)


def test_table_is_complete() -> None:
    assert len(SPELLINGS) >= 24
    assert len({s.name for s in SPELLINGS}) == len(SPELLINGS)
    assert all(len(s.mutants) >= 3 for s in SPELLINGS)
    wanted = {Kind.S1, Kind.S2, Kind.S4, Kind.S5, Kind.WINDOW, Kind.COMPRESSED, Kind.LAYER}
    assert {s.kind for s in SPELLINGS} == wanted
    assert {s.kind for s in LOOKALIKES} == {Kind.S3, Kind.S8, Kind.S9}


@each_spelling
def test_parent_is_finite_and_uses_every_input(spelling: Spelling) -> None:
    problem = spelling.make(SEED)
    for name, tensor in outputs(problem, problem[0]).items():
        assert tensor is not None, name
        assert tensor.isfinite().all(), name


@each_mutant
def test_mutant_is_another_function(spelling: Spelling, mutant: Mutant) -> None:
    parent, inputs = spelling.make(SEED)
    other, same_inputs = spelling.make(SEED, mutant)
    assert all(torch.equal(a, b) for a, b in zip(inputs, same_inputs, strict=True))
    with torch.no_grad():
        difference = (parent(*inputs) - other(*inputs)).abs()
    assert difference.nan_to_num(0.0).max() >= 1e-3


@each_spelling
def test_spelling_is_rewritten(spelling: Spelling) -> None:
    problem = spelling.make(SEED)
    got, report = compiled(problem)
    assert rewritten(report) == sorted(spelling.roles), why(report)
    assert_same(got, outputs(problem, problem[0]))


@each_mutant
def test_mutant_keeps_its_meaning(spelling: Spelling, mutant: Mutant) -> None:
    problem = spelling.make(SEED, mutant)
    got, report = compiled(problem)
    assert_same(got, outputs(problem, problem[0]))
    if mutant.must_refuse:
        assert len(rewritten(report)) < len(spelling.roles), why(report)


@each_lookalike
def test_lookalike_is_left_alone(lookalike: LookAlike) -> None:
    problem = lookalike.make(SEED)
    got, report = compiled(problem)
    assert report.sites, "no site found, so the user is told nothing"
    assert not rewritten(report), why(report)
    assert all(site.reason is not None and site.reason.text for site in report.sites), why(report)
    if lookalike.reasons:
        assert {site.reason.kind for site in report.sites if site.reason} & lookalike.reasons, why(report)
    assert_same(got, outputs(problem, problem[0]))
