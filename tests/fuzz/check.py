"""Run a generated model eagerly and compiled, and compare outputs and all gradients."""

from __future__ import annotations

import linecache
import time
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fsa_compile
from fuzz.model import Model

OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True, "proof_seconds": 60}
"""Forward and backward are traced as for Inductor, and no code is generated. A loaded machine must not change a verdict, so
proofs have time."""

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
"""Norm-wise for each tensor, against eager in the same dtype. Rounding leaves 1e-6 and 1e-15 at these sizes."""

BFLOAT16_FACTOR, BFLOAT16_FLOOR = 2.0, 1e-2
"""In bfloat16 the error against float64 may be this much larger than eager's, plus a few roundings."""

DIFFERENT = 1e-3
"""A mutant differs from its parent by this much, norm-wise, in some output or gradient."""

NEGLIGIBLE = 0.05
"""A tensor with a smaller norm than this share of the largest has no digits of its own: the gradient of the bias of all keys,
for one, is zero but for rounding. A single number, such as the gradient of a temperature, sums over everything and most of that
cancels: it has the digits of the largest tensor."""

Outcome = dict[str, Tensor | None]

_numbers = count()


@dataclass(frozen=True)
class Verdict:
    """What became of one model.

    Args:
        roles: What the rewritten sites were found to be, in order.
        reasons: "kind: text" of each site that was refused or left.
        error: Largest norm-wise difference from eager.
        wrong: What differs, empty if nothing does.
        seconds: Time of the compiled first call.
    """

    roles: tuple[str, ...]
    reasons: tuple[str, ...]
    error: float
    wrong: str
    seconds: float

    @property
    def rewritten(self) -> int:
        """Number of sites that run on an op."""
        return len(self.roles)


class Subject:
    """A model brought to life: the module and its inputs, the same ones every time for one seed."""

    def __init__(self, model: Model, seed: int = 0) -> None:
        self.model = model
        self.seed = seed
        filename = f"<model {next(_numbers)}>"
        # The reports name source lines and Dynamo prints them.
        linecache.cache[filename] = (len(model.source), None, model.source.splitlines(True), filename)
        names: dict[str, Any] = {"__name__": "generated"}
        exec(compile(model.source, filename, "exec"), names)  # noqa: S102
        self.text = SimpleNamespace(**names)

    def module(self, dtype: torch.dtype) -> torch.nn.Module:
        """A fresh module; its parameters are the seed's, rounded to the model's dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.text.Model()
        return module.to(getattr(torch, self.model.dtype)).to(dtype)

    def inputs(self, dtype: torch.dtype, extra: int = 0) -> dict[str, Tensor]:
        """The inputs by name, rounded to the model's dtype; `extra` tokens longer."""
        generator = torch.Generator().manual_seed(self.seed)
        values = self.text.inputs(generator, self.text.N + extra)
        rounded = getattr(torch, self.model.dtype)
        return {name: value.to(rounded).to(dtype) if value.is_floating_point() else value for name, value in values.items()}

    def run(self, function: Any, module: torch.nn.Module, inputs: dict[str, Tensor]) -> Outcome:
        """Output and, if the model wants them, gradients of a random loss."""
        if not self.model.grad:
            with torch.no_grad():
                return {"output": function(**inputs)}
        leaves = {name: value.requires_grad_() for name, value in inputs.items() if value.is_floating_point()}
        output = function(**inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        module.zero_grad()
        (output * weights).sum().backward()
        outcome: Outcome = {"output": output.detach()}
        outcome |= {name: leaf.grad for name, leaf in leaves.items()}
        return outcome | {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def eager(model: Model, seed: int = 0, extra: int = 0, dtype: torch.dtype | None = None) -> Outcome:
    """The model's outcome as PyTorch computes it."""
    subject = Subject(model, seed)
    dtype = dtype or getattr(torch, model.dtype)
    module = subject.module(dtype)
    return subject.run(module, module, subject.inputs(dtype, extra))


def difference(a: Outcome, b: Outcome) -> tuple[float, str]:
    """The largest norm-wise difference of two outcomes and the name of the tensor that has it.

    NaNs in the same places are equal; in other places they are infinitely far apart. A gradient that is missing on one side
    counts as zeros there.
    """
    worst, where = 0.0, ""
    norms = [float(value.double().nan_to_num(0.0, 0.0, 0.0).norm()) for value in a.values() if value is not None]
    largest = max(norms)
    for name in a.keys() | b.keys():
        left, right = a.get(name), b.get(name)
        if left is None and right is None:
            continue
        left = torch.zeros_like(right) if left is None else left
        right = torch.zeros_like(left) if right is None else right
        left, right = left.double(), right.double()
        if left.shape != right.shape or not torch.equal(left.isfinite(), right.isfinite()):
            return float("inf"), name
        left, right = left.nan_to_num(0.0, 0.0, 0.0), right.nan_to_num(0.0, 0.0, 0.0)
        floor = largest if left.numel() == 1 else NEGLIGIBLE * largest
        error = float((left - right).norm() / torch.maximum(left.norm(), right.norm()).clamp(min=floor))
        if error > worst:
            worst, where = error, name
    return worst, where


def check(model: Model, seed: int = 0, backend: str = "fsa") -> Verdict:
    """Compile the model and compare it with eager, for dynamic models at a second length as well."""
    torch._dynamo.reset()
    subject = Subject(model, seed)
    dtype = getattr(torch, model.dtype)
    module = subject.module(dtype)
    dynamic = True if model.dynamic == "all" else None
    options = OPTIONS if backend == "fsa" else None
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic, options=options)
    error, wrong, report = 0.0, "", None
    seconds = 0.0
    for extra in (0, 16) if model.dynamic != "static" else (0,):
        inputs = subject.inputs(dtype, extra)
        if model.dynamic == "mark":
            for value in inputs.values():
                for axis, size in enumerate(value.shape):
                    if size == subject.text.N + extra:
                        torch._dynamo.maybe_mark_dynamic(value, axis)
        start = time.perf_counter()
        actual = subject.run(compiled, module, inputs)
        if report is None:
            report = fsa_compile.last_report()
            seconds = time.perf_counter() - start
        found, text = compare(model, seed, extra, actual)
        error, wrong = max(error, found), wrong or text
    assert report is not None
    reasons = tuple(f"{site.reason.kind}: {site.reason}" for site in report.sites if site.reason is not None)
    roles = tuple(site.role for site in report.sites if site.verdict is fsa_compile.Verdict.REWRITTEN)
    return Verdict(roles, reasons, error, wrong, seconds)


def compare(model: Model, seed: int, extra: int, actual: Outcome) -> tuple[float, str]:
    """The error of a compiled outcome against eager, and a sentence if it is too large."""
    expected = eager(model, seed, extra)
    error, where = difference(expected, actual)
    allowed = TOLERANCE.get(model.dtype)
    if allowed is None:
        exact = eager(model, seed, extra, torch.float64)
        error, where = difference(exact, actual)
        allowed = BFLOAT16_FACTOR * difference(exact, expected)[0] + BFLOAT16_FLOOR
    if error <= allowed:
        return error, ""
    return error, f"{where} differs by {error:.2e} at length + {extra}, allowed are {allowed:.0e}"
