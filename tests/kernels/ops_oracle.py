"""Runs an op and its oracle on the same random problem. The oracle is `fsa_compile.kernels.reference` in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fsa_compile.kernels import ops, reference

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """Operands (b, hq, n, dk), (b, hkv, m, dk), (b, hkv, m, dv) of the op `name` and its other arguments by name."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    arguments: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def with_arguments(self, **arguments: Any) -> Problem:
        return replace(self, arguments={**self.arguments, **arguments})

    @property
    def op(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return getattr(ops, self.name)

    @property
    def oracle(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return getattr(reference, self.name)

    @property
    def visible(self) -> Tensor:
        """Which keys the queries see, boolean (b or 1, h, n, m)."""
        n, m, given = self.q.shape[2], self.k.shape[2], dict(self.arguments)
        given.pop("scale")
        start = given.pop("q_offset", 0 if self.name == "compressed_attention" else m - n)
        positions = reference.query_positions(n, start, given.pop("q_offsets", None), self.q.device)
        if self.name == "selected_attention":
            return reference.selected_visibility(positions=positions, m=m, **given)
        if self.name == "compressed_attention":
            return reference.compressed_visibility(positions=positions, c=m, **given)
        return reference.sliding_window_visibility(positions=positions, m=m, **given)


def problem(
    name: str, b: int = 2, hq: int = 4, hkv: int = 2, n: int = 40, m: int = 40, dk: int = 16, dv: int = 8, **arguments: Any
) -> Problem:
    """Standard normal float64 operands, and a value for every argument of the op that is not given.

    Block lists hold `t` entries per index head (`hi`, default hkv): random numbers from -2 to two past the last block, so that
    -1 stands anywhere, and duplicates, foreign numbers and empty rows occur.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = arguments.pop("scale", dk**-0.5)
    if name == "selected_attention":
        block_size, hi, t = arguments.pop("block_size", 8), arguments.pop("hi", hkv), arguments.pop("t", 3)
        blocks = -(-m // block_size)
        indices = torch.randint(-2, blocks + 2, (b, hi, n, t), generator=generator)
        arguments = {"indices": indices, "block_size": block_size, "scale": scale, "rule": "causal", **arguments}
    elif name == "compressed_attention":
        arguments = {"scale": scale, "stride": 4, "last": 7, **arguments}
    else:
        arguments = {"window": 9, "scale": scale, **arguments}
    return Problem(name, normal(b, hq, n, dk), normal(b, hkv, m, dk), normal(b, hkv, m, dv), arguments)


def run(function: Callable[..., tuple[Tensor, Tensor]], p: Problem, lse_weight: float = 1.0) -> dict[str, Tensor]:
    """out, lse and the gradients of a random linear form of both (lse of empty rows left out, where it is -inf)."""
    q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    out, lse = function(q, k, v, **p.arguments)
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    loss = (out.double() * dout).sum() + lse_weight * (lse.double().masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
    return dict(zip(NAMES, (out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; infinities must agree, and NaN is an infinite error."""
    actual, expected = actual.double(), expected.double()
    if not torch.equal(actual.isinf(), expected.isinf()) or bool(actual.isnan().any()):
        return float("inf")
    difference = torch.where(expected.isinf(), 0.0, actual - expected).norm()
    return float(difference / torch.where(expected.isinf(), 0.0, expected).norm().clamp(min=1e-300))


def errors(p: Problem) -> dict[str, float]:
    """`relative_error` of the op's result and gradients against the float64 oracle on the same (rounded) operands."""
    actual, expected = run(p.op, p), run(p.oracle, p.to(torch.float64))
    return {name: relative_error(actual[name], expected[name]) for name in NAMES}


def assert_right(p: Problem, tolerance: float = 1e-12) -> None:
    """The op agrees with the oracle; 1e-12 suits float64, where a wrong key, weight or row is an error above 1e-4."""
    for name, error in errors(p).items():
        assert error <= tolerance, f"{name} is off by {error:.2e}"
