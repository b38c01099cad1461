"""The table of ``tests/spellings``: every spelling, mutant and look-alike under the backend, compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fsa_compile
from tests.spellings.lookalikes import LOOKALIKES
from tests.spellings.spelling import Kind, Problem
from tests.spellings.test_spellings import SEED, SPELLINGS

from .trial import OPTIONS, difference, in_words

CLASSES = tuple(kind.name for kind in Kind if any(s.kind is kind for s in (*SPELLINGS, *LOOKALIKES)))
"""Names of the classes that the table has."""


def titles() -> dict[str, str]:
    """What each class is."""
    return {kind.name: kind.value for kind in Kind}


def run(name: str) -> dict[str, Any]:
    """One class: a row for each spelling, mutant and look-alike in it."""
    rows = []
    for spelling in (s for s in SPELLINGS if s.kind.name == name):
        rows.append({"name": spelling.name, "wanted": sorted(spelling.roles), **_row(spelling.make(SEED))})
        for mutant in spelling.mutants:
            rows.append({"name": spelling.name, "mutant": mutant.name, **_row(spelling.make(SEED, mutant))})
    for lookalike in (s for s in LOOKALIKES if s.kind.name == name):
        rows.append({"name": lookalike.name, "lookalike": True, **_row(lookalike.make(SEED))})
    return {"rows": rows}


def _row(problem: Problem) -> dict[str, Any]:
    """Verdicts and the largest difference from eager."""
    torch._dynamo.reset()
    try:
        got = _results(problem, torch.compile(problem[0], backend="fsa", fullgraph=True, options=dict(OPTIONS)))
    except Exception as fault:  # noqa: BLE001 - whatever it is, the page has to show it
        return {"fault": in_words(fault), "sites": [], "difference": float("inf")}
    sites = [site for graph in fsa_compile.last_report().to_dict()["graphs"] for site in graph["sites"]]
    want = _results(problem, problem[0])
    return {"sites": sites, "difference": max(difference(got[name], tensor) for name, tensor in want.items())}


def _results(problem: Problem, run: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    """Output and, by name, gradients of a random functional of it."""
    fn, inputs = problem
    leaves = {f"input {i}": x for i, x in enumerate(inputs)} | (dict(fn.named_parameters()) if isinstance(fn, nn.Module) else {})
    out = run(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + 1))
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return {"output": out.detach(), **{name: g for name, g in zip(leaves, gradients, strict=True)}}
