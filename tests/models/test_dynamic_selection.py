"""The real models under dynamic=True: selections are fused, and one graph serves all lengths with enough blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fsa_compile

from .subjects import DIM, VOCABULARY, dense_nsa, minimax_m3

OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True, "proof_seconds": 60}
TOLERANCE = 1e-5
"""Norm-wise in float32, as in the tests without dynamic lengths."""


def states(n: int) -> Tensor:
    """(3, n, DIM): a batch that is no other size of the model, because Dynamo takes equal sizes for one."""
    return torch.randn(3, n, DIM, generator=torch.Generator().manual_seed(n))


def numbers(n: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (3, n), generator=torch.Generator().manual_seed(n))


def fused(model: torch.nn.Module, call: Callable[..., Tensor], inputs: list[Tensor]) -> list[list[bool]]:
    """Whether the selections of each graph are fused, once all lengths equal eager, gradients of parameters included."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fsa", dynamic=True, fullgraph=True, options=OPTIONS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for x in inputs:
        results = []
        for f in (compiled, model):
            out = call(f, x)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            results.append((out, *torch.autograd.grad(out, parameters, upstream, allow_unused=True)))
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) is (theirs is None)
            assert ours is None or (ours - theirs).norm() <= TOLERANCE * theirs.norm().clamp(min=1e-3)
    graphs = fsa_compile.last_report().graphs
    return [[s.selection.fused for s in g.sites if s.role == "selected" and s.selection is not None] for g in graphs]


@pytest.mark.parametrize("lengths", [(160, 208, 96), (161, 200, 99)], ids=["whole_blocks", "any"])
def test_dense_nsa(lengths: tuple[int, ...]) -> None:
    found = fused(dense_nsa().model, lambda f, x: f(x), [states(n) for n in lengths])
    assert found == [[True]]


def test_dense_nsa_of_few_blocks_is_another_graph() -> None:
    """Three blocks are less than the top-k: then the width of the list is the number of blocks, and no number."""
    found = fused(dense_nsa().model, lambda f, x: f(x), [states(n) for n in (160, 48)])
    assert found[0] == [True] and len(found) == 2


def test_minimax_m3() -> None:
    """Lengths that are whole blocks are another graph than others by the model's own code, which pads."""
    found = fused(
        minimax_m3("eager").model,
        lambda f, ids: f(input_ids=ids, use_cache=False).last_hidden_state,
        [numbers(n) for n in (192, 256, 200, 250)],
    )
    assert found == [[True, True], [True, True]]
