"""One model, eagerly and under the backend: its sites, what the report says, and how far the results are apart."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fsa_compile

OPTIONS: Mapping[str, Any] = {"inner": "aot_eager", "profit": "always", "strict": True, "proof_seconds": 60}
"""As in the tests: no code is generated, rewrites are judged by proof alone, and a loaded machine changes no verdict."""

TOLERANCE = 1e-5
"""Norm-wise, per tensor, float32 against eager; a wrong key, weight or head shows at 1e-2 and above."""


class NotRun(Exception):
    """The model cannot be run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Args:
        function: Module or function.
        inputs: Positional arguments; floating-point tensors are differentiated.
        keywords: Further arguments, not differentiated.
        output: From what it returns to one tensor.
        backward: Whether gradients are compared; the forward alone runs under `torch.no_grad`.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    output: Callable[[Any], Tensor] = lambda result: result
    backward: bool = True


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters at random, gates, memory and positions included: a default of 0 would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.5))
    return model


def randoms(*shapes: tuple[int, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Standard normal float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def picks(batch: int, heads: int, n: int, block: int, top_k: int, seed: int = 2) -> Tensor:
    """Blocks of each query (batch, heads, n, top_k), its own among them, -1 where it has fewer than `top_k` to choose from."""
    generator = torch.Generator().manual_seed(seed)
    blocks, own = torch.arange(-(-n // block)), torch.arange(n)[:, None] // block
    scores = torch.rand((batch, heads, n, len(blocks)), generator=generator)
    scores = scores.masked_fill(blocks > own, -1.0).masked_fill(blocks == own, 2.0)
    values, indices = scores.topk(top_k)
    return torch.where(values < 0, -1, indices)


def block_mask(indices: Tensor, blocks: int) -> Tensor:
    """The lists of `picks` as booleans (batch, heads, n, blocks)."""
    return (indices[..., None] == torch.arange(blocks)).any(-2)


def results(case: Case, function: Callable[..., Any], seed: int = 7) -> dict[str, Tensor | None]:
    """Output of `function` and, by name, the gradients of a random functional of it."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in case.inputs]
    if not case.backward:
        with torch.no_grad():
            return {"output": case.output(function(*inputs, **case.keywords)).detach()}
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    if isinstance(function, nn.Module):
        leaves |= {name.removeprefix("_orig_mod."): p for name, p in function.named_parameters() if p.requires_grad}
    out = case.output(function(*inputs, **case.keywords))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return {"output": out.detach(), **{f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}}


def difference(got: Tensor | None, want: Tensor | None) -> float:
    """Norm-wise difference of two tensors; infinite if NaN, or no gradient at all, stands in other places.

    A gradient that one side does not have is 0 on the other: eager has None where nothing was computed.
    """
    if got is None or want is None:
        present = got if want is None else want
        return 0.0 if present is None or not present.any() else float("inf")
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    got, want = got.nan_to_num(0.0).double(), want.nan_to_num(0.0).double()
    return ((got - want).norm() / want.norm().clamp(min=1e-6)).item()


def run(case: Case) -> dict[str, Any]:
    """Runs the case eagerly and compiled, as one graph if Dynamo can, and compares.

    Returns:
        Plain data: ``eager`` and ``fault`` (an exception of the eager and of the compiled model in words, or nothing), ``breaks``
        (whether the graph broke), ``break_reason`` (Dynamo's, of the first), ``notes``, ``sites``, ``difference`` (the largest),
        ``worst`` (its tensor), ``nan`` (whether eager has any), ``graphs`` (how many), ``seconds`` (of the first compiled step),
        ``analysis`` (of the backend's part).
    """
    try:
        want = results(case, copy.deepcopy(case.function))
    except Exception as fault:  # noqa: BLE001 - some models do not run at all
        return {"eager": in_words(fault)}
    row: dict[str, Any] = {"eager": "", "fault": "", "breaks": False, "break_reason": ""}
    start = time.perf_counter()
    try:
        try:
            got = _compiled(case, fullgraph=True)
        except torch._dynamo.exc.BackendCompilerFailed:
            raise  # ours, and to be seen
        except torch._dynamo.exc.TorchDynamoException as fault:
            row |= {"breaks": True, "break_reason": in_words(fault)}
            start = time.perf_counter()
            got = _compiled(case, fullgraph=False)
    except Exception as fault:  # noqa: BLE001 - whatever it is, the page has to show it
        row |= {"fault": in_words(fault)}
        got = {}
    report = fsa_compile.last_report()
    graphs = report.to_dict()["graphs"]
    apart = {name: difference(got.get(name), tensor) for name, tensor in want.items()}
    worst = max(apart, key=apart.__getitem__)
    return row | {
        "seconds": time.perf_counter() - start,
        "analysis": sum(seconds for graph in graphs for seconds in graph["seconds"].values()),
        "graphs": len(graphs),
        "notes": [*report.notes, *(note for graph in graphs for note in graph["notes"])],
        "sites": [site for graph in graphs for site in graph["sites"]],
        "difference": apart[worst],
        "worst": worst,
        "nan": any(tensor is not None and bool(tensor.isnan().any()) for tensor in want.values()),
    }


def _compiled(case: Case, fullgraph: bool) -> dict[str, Tensor | None]:
    torch._dynamo.reset()
    function = copy.deepcopy(case.function)
    return results(case, torch.compile(function, backend="fsa", fullgraph=fullgraph, options=dict(OPTIONS)))


def in_words(fault: BaseException) -> str:
    """An exception in one line; what a compiler's exception is about stands in its second. Without one: where it is from."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    if not lines:
        lines = [f"{Path(f.filename).name}:{f.lineno}: {f.line}" for f in traceback.extract_tb(fault.__traceback__)[-1:]]
    return f"{type(fault).__name__}: {' '.join(lines[:2])}"[:300]
