"""Run a model, run it compiled, compare: what the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fsa_compile
from fsa_compile.report import Report, Verdict

OPTIONS: Mapping[str, Any] = {"inner": "aot_eager", "profit": "always", "strict": True, "proof_seconds": 60}
"""`aot_eager` traces forward and backward as Inductor would and generates no code, which takes seconds instead of a minute.
Whether Inductor takes the rewritten graph is shown by the tests that are marked `inductor`. The time limit of a proof is long
because a loaded machine must not change a verdict."""

TOLERANCE = 1e-5
"""Norm-wise, per tensor, of float32 against eager. Sums over at most 256 keys round at 1e-7 to 1e-6; a wrong key, weight or
head shows at 1e-2 and above."""

BF16_FACTOR = 1.5
"""How much larger a bfloat16 error may be than that of the same inner compiler without the rewrite, both against float32 with
the same weights. No fixed bound would mean anything: rounding flips picks of the top-k, in every compiler alike."""

Outcome = dict[str, Tensor | None]
"""Output and gradients by name; None for a parameter that gets no gradient."""


@dataclass(frozen=True)
class Subject:
    """A model, an input, and how the one is applied to the other.

    Attributes:
        model: What is compiled.
        inputs: Tensors; floating-point ones are differentiated too.
        keywords: Further arguments of the call.
        output: From what the model returns to one tensor.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    keywords: Mapping[str, Any]
    output: Callable[[Any], Tensor]

    def to(self, dtype: torch.dtype) -> Subject:
        """The same with parameters and floating-point inputs converted, the model in place."""
        inputs = tuple(x.detach().to(dtype) if x.is_floating_point() else x for x in self.inputs)
        return Subject(self.model.to(dtype), inputs, self.keywords, self.output)


def subject(
    model: nn.Module, *inputs: Tensor, output: Callable[[Any], Tensor] = lambda result: result, **keywords: Any
) -> Subject:
    """A `Subject` that is called as ``model(*inputs, **keywords)``."""
    return Subject(model, inputs, keywords, output)


def run(case: Subject, function: Callable[..., Any] | None = None, seed: int = 7) -> Outcome:
    """Output of the model (or of its compiled form `function`) and the gradients of a random functional of it."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in case.inputs]
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    leaves |= {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    out = case.output((case.model if function is None else function)(*inputs, **case.keywords))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return {"output": out.detach(), **{f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}}


@dataclass(frozen=True)
class Trial:
    """One subject eagerly and compiled.

    Attributes:
        case: The subject.
        eager: What the model computes.
        compiled: What the compiled model computes.
        report: What the backend says that it did.
    """

    case: Subject
    eager: Outcome
    compiled: Outcome
    report: Report


def run_compiled(case: Subject, **options: Any) -> tuple[Outcome, Report]:
    """`run` under the backend, from a fresh compilation in one graph, and what it reports."""
    compiled = compile_model(case.model, **options)
    return run(case, compiled), fsa_compile.last_report()


def compare(case: Subject, **options: Any) -> Trial:
    """The subject both ways."""
    return Trial(case, run(case), *run_compiled(case, **options))


def compile_model(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """The model under the backend with the options of these tests; earlier compilations are forgotten."""
    torch._dynamo.reset()
    return torch.compile(model, backend="fsa", fullgraph=True, options={**OPTIONS, **options})


def run_baseline(case: Subject) -> Outcome:
    """`run` under the inner compiler alone."""
    torch._dynamo.reset()
    return run(case, torch.compile(case.model, backend="aot_eager", fullgraph=True))


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`, in float64."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def errors(got: Outcome, want: Outcome) -> dict[str, float]:
    """`error` of each tensor.

    Raises:
        AssertionError: If a gradient is missing on one side only, or a value is not finite.
    """
    assert got.keys() == want.keys()
    missing = {name for name, x in want.items() if x is None}
    assert {name for name, x in got.items() if x is None} == missing, "gradients are missing on one side"
    for name, x in (*got.items(), *want.items()):
        assert x is None or x.isfinite().all(), f"{name} is not finite"
    return {name: error(x, want[name]) for name, x in got.items() if x is not None}


def assert_same(got: Outcome, want: Outcome, tolerance: float = TOLERANCE) -> None:
    """Every tensor within `tolerance`, norm-wise."""
    wrong = {name: f"{e:.1e}" for name, e in errors(got, want).items() if not e <= tolerance}
    assert not wrong, f"off by more than {tolerance}: {wrong}"


def assert_bfloat16_as_exact_as_baseline(case: Subject) -> Report:
    """In bfloat16 every tensor's error, against float32 with the same weights, is at most `BF16_FACTOR` times the baseline's.

    Returns:
        The report of the bfloat16 compilation.
    """
    exact = run(case.to(torch.bfloat16).to(torch.float32))
    rounded = case.to(torch.bfloat16)
    got, report = run_compiled(rounded)
    assert_as_exact(got, run_baseline(rounded), exact)
    return report


def assert_as_exact(got: Outcome, baseline: Outcome, exact: Outcome) -> None:
    """Every tensor's error against `exact` at most `BF16_FACTOR` times the baseline's."""
    allowed = errors(baseline, exact)
    wrong = {
        name: f"{e:.1e} against {allowed[name]:.1e}"
        for name, e in errors(got, exact).items()
        if not e <= BF16_FACTOR * allowed[name]
    }
    assert not wrong, f"larger errors than the baseline's: {wrong}"


def by_module(report: Report, verdict: Verdict = Verdict.REWRITTEN) -> dict[str, list[str]]:
    """The sorted roles of the sites with that verdict, for each module path."""
    found: dict[str, list[str]] = {}
    for site in report.sites:
        if site.verdict is verdict:
            found.setdefault(site.module, []).append(site.role)
    return {module: sorted(roles) for module, roles in found.items()}


def randomise(model: nn.Module, seed: int, keep: tuple[str, ...] = ()) -> None:
    """Every parameter at random, so that none hides an error by being zero or nearly so.

    Matrices keep the scale that preserves the variance of what they multiply; everything else gets standard deviation 0.5.
    Names that contain one of `keep` are left as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not any(part in name for part in keep):
                scale = p.shape[-1] ** -0.5 if p.dim() == 2 else 0.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
