"""Small attention functions through `torch.compile(backend="fsa")`, against eager: outputs, gradients, places of NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fsa_compile
from fsa_compile.report import ReasonKind, Report, Site, Verdict

OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True, "proof_seconds": 60}
BATCH, HEADS, KV_HEADS, LENGTH, DIM, WINDOW, BLOCK, TOP_K = 1, 4, 2, 32, 8, 8, 4, 2
TOLERANCE = 2e-6
"""Norm-wise per tensor. Float32 sums over at most 32 keys stay below 5e-7; the smallest error of a wrong rewrite seen is 1e-2."""

Function = Callable[..., Any]


def randoms(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Standard normal float32 leaves that need grad."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def qkv(n: int = LENGTH, m: int | None = None, heads: int = HEADS, kv_heads: int = HEADS) -> tuple[Tensor, ...]:
    """q ``(b, heads, n, d)``; k, v ``(b, kv_heads, m, d)``."""
    m = n if m is None else m
    return randoms((BATCH, heads, n, DIM), (BATCH, kv_heads, m, DIM), (BATCH, kv_heads, m, DIM))


def band(n: int = LENGTH, window: int = WINDOW) -> Tensor:
    """The sliding window as a mask ``(n, n)``."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (j <= i) & (i - j < window)


@dataclass(frozen=True)
class Outcome:
    """What a function gave: its tensors, then the gradients of its inputs."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


def outcome(fn: Function, inputs: tuple[Tensor, ...]) -> Outcome:
    """Runs `fn` and takes gradients of a random functional of its real outputs. Inputs are copied: `fn` may write into them."""
    leaves = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
    outputs = tuple(tree_leaves(fn(*leaves)))
    generator = torch.Generator().manual_seed(99)
    pairs = [(o, torch.randn(o.shape, generator=generator).to(o.dtype)) for o in outputs if o.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    if pairs and wanted:
        gradients = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return Outcome(tuple(o.detach() for o in outputs), gradients)


def assert_same(got: Outcome, want: Outcome, tolerance: float = TOLERANCE) -> None:
    for kind in ("outputs", "gradients"):
        ours, theirs = getattr(got, kind), getattr(want, kind)
        assert len(ours) == len(theirs)
        for k, (a, b) in enumerate(zip(ours, theirs)):
            name = f"{kind}[{k}]"
            if b is None or a is None:
                # A gradient of zeros is what eager calls unused where the op still knows the input, never more.
                assert a is b is None or (b is None and not a.any()), (
                    f"{name}: {'none' if a is None else 'some'}, eager the other"
                )
                continue
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a.isnan(), b.isnan()), f"{name}: {int(a.isnan().sum())} NaN, eager has {int(b.isnan().sum())}"
            assert torch.equal(a.isinf(), b.isinf()), f"{name}: infinities in other places"
            a, b = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
            error = (a - b).norm() / b.norm().clamp(min=1e-6)
            assert error <= tolerance, f"{name}: off by {error:.1e}"


def compiled_like_eager(
    fn: Function, inputs: tuple[Tensor, ...], *, tolerance: float = TOLERANCE, fullgraph: bool = True, **options: Any
) -> Report:
    """Asserts that the compiled function is the eager one, and returns the report."""
    want = outcome(fn, inputs)
    torch._dynamo.reset()
    got = outcome(torch.compile(fn, backend="fsa", fullgraph=fullgraph, options={**OPTIONS, **options}), inputs)
    report = fsa_compile.last_report()
    try:
        assert_same(got, want, tolerance)
    except AssertionError as error:
        raise AssertionError(f"{error}; {why(report)}") from None
    return report


def why(report: Report) -> str:
    return "; ".join(f"{s.role} {s.verdict} {dict(s.parameters)} {s.reason and s.reason.kind}: {s.reason}" for s in report.sites)


def only_site(report: Report) -> Site:
    assert len(report.sites) == 1, why(report) or "no site"
    return report.sites[0]


def assert_rewritten(report: Report, role: str = "sliding_window") -> None:
    site = only_site(report)
    assert (site.verdict, site.role) == (Verdict.REWRITTEN, role), why(report)


def assert_refused(report: Report, *kinds: ReasonKind) -> None:
    site = only_site(report)
    assert site.verdict is Verdict.REFUSED and site.reason is not None and site.reason.text, why(report)
    assert not kinds or site.reason.kind in kinds, why(report)
