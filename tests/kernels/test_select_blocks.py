"""Choosing blocks: the oracle against plain integers, the blocked path against the oracle, the ops as PyTorch sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from selection_oracle import draw, scores
from torch import Tensor

from fsa_compile import ops as public
from fsa_compile.kernels import cpu_select, ops, reference

CHOICE = (4, 1, 2)  # top_k, n_init, n_local
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"hkv": 1, "group": 1},
    "batch offsets": {"b": 3, "n_keys": 90, "q_offsets": torch.tensor([50, -5, 0])},
    "cache": {"n": 3, "q_offset": 77},
    "memory tokens": {"prefix": 2},
    "keys apart": {"stride": 8, "kernel_size": 3},
    "odd sizes": {"stride": 3, "kernel_size": 7, "block_size": 10, "n_keys": 37},
    "keys of several blocks": {"stride": 3, "kernel_size": 25, "block_size": 5},
    "short": {"n_keys": 5, "kernel_size": 6},
}


def test_overlap_is_equation_9() -> None:
    """Blocks of 64, keys of 32 every 16: the keys 4 j - 1 ... 4 j + 3 count 1, 2, 2, 2, 1 times for block j."""
    overlap = reference.block_overlap(16, 4, stride=16, kernel_size=32, block_size=64, device=torch.device("cpu"))
    for j in range(4):
        expected = torch.zeros(16, dtype=torch.float64)
        for key, weight in zip(range(4 * j - 1, 4 * j + 4), (1, 2, 2, 2, 1)):
            if key >= 0:
                expected[key] = weight
        assert torch.equal(overlap[:, j], expected)


@pytest.mark.parametrize(("top_k", "n_init", "n_local"), [(4, 1, 2), (3, 0, 0), (5, 0, 5), (2, 2, 0), (12, 1, 1)])
def test_best_blocks_is_what_its_documentation_says(top_k: int, n_init: int, n_local: int) -> None:
    values = torch.randint(0, 4, (1, 2, 40, 9), generator=torch.Generator().manual_seed(0)).float()  # plenty of ties
    positions = torch.arange(40)[None] - 3
    got = reference.best_blocks(values, positions, 4, top_k, n_init, n_local)
    for h, i in torch.cartesian_prod(torch.arange(2), torch.arange(40)).tolist():
        position = i - 3
        may = [j for j in range(9) if j * 4 <= position]
        must = [j for j in may if j < n_init or j > position // 4 - n_local]
        others = sorted((j for j in may if j not in must), key=lambda j: (-values[0, h, i, j].item(), j))
        expected = sorted(must + others[: top_k - len(must)])
        assert got[0, h, i].tolist() == expected + [-1] * (top_k - len(expected))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_op_is_the_oracle(shape: dict[str, Any]) -> None:
    arguments, offsets = draw(0, dtype=torch.float64, **shape)
    expected = reference.select_blocks(*arguments, *CHOICE, *offsets)
    assert torch.equal(ops.select_blocks(*arguments, *CHOICE, *offsets), expected)
    want = reference.best_blocks(
        scores(*arguments, *offsets), reference.query_positions(arguments[0].shape[2], *offsets, expected.device),
        arguments[8], *CHOICE,
    )  # fmt: skip
    assert torch.equal(expected, want)


@pytest.mark.parametrize("heads", [(2, 1), (4, 4)])
@pytest.mark.parametrize(("m", "offset", "block_size"), [(40, None, 8), (37, None, 8), (90, 20, 16), (5, 0, 8)])
def test_the_op_of_the_second_rule_is_the_oracle(heads: tuple[int, int], m: int, offset: int | None, block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64) for h, n in ((heads[0], 30), (heads[1], m)))
    for offsets in (None, torch.tensor([3, 11])):
        arguments = q, k, block_size, *CHOICE, offset, offsets
        assert torch.equal(ops.select_blocks_by_max(*arguments), reference.select_blocks_by_max(*arguments))


def test_the_second_rule_is_that_of_minimax_m3() -> None:
    """Its indexer pools logits by their maximum, forces the query's own blocks, and takes the top k: as sets, the same."""
    q, k = torch.randn(1, 3, 50, 8, generator=torch.Generator().manual_seed(0)), torch.randn(1, 1, 50, 8)
    logits = (q @ k.transpose(-1, -2)).masked_fill(torch.arange(50) > torch.arange(50)[:, None], -torch.inf)
    pooled = torch.nn.functional.pad(logits, (0, 6), value=-torch.inf).unflatten(-1, (7, 8)).amax(-1)
    own = (torch.arange(50) // 8)[:, None] - torch.arange(2)
    pooled.scatter_(-1, own.clamp(min=0).expand(1, 3, 50, 2), torch.inf)
    values, expected = pooled.topk(4)
    expected = expected.masked_fill(values == -torch.inf, 99).sort(-1).values
    got = public.select_blocks_by_max(q, k, block_size=8, top_k=4, n_local=2)
    assert torch.equal(got.masked_fill(got < 0, 99).long(), expected)


@pytest.mark.parametrize("elements", [1, 500])
def test_small_scratch_cuts_the_work_and_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, offsets = draw(1, b=2, n=20, dtype=torch.float64, q_offsets=torch.tensor([0, 30]), n_keys=50)
    q, k = torch.randn(2, 2, 20, 8), torch.randn(2, 1, 20, 8)
    whole = ops.select_blocks(*arguments, *CHOICE, *offsets), ops.select_blocks_by_max(q, k, 4, *CHOICE)
    monkeypatch.setattr(cpu_select, "SCRATCH_ELEMENTS", elements)
    assert torch.equal(ops.select_blocks(*arguments, *CHOICE, *offsets), whole[0])
    assert torch.equal(ops.select_blocks_by_max(q, k, 4, *CHOICE), whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    for shape in ({}, {"b": 2, "q_offsets": torch.tensor([3, 9]), "n_keys": 50}):
        arguments, offsets = draw(2, n=12, dtype=dtype, **shape)
        q = arguments[0].detach().requires_grad_()
        torch.library.opcheck(ops.select_blocks, (q, *arguments[1:], *CHOICE, *offsets))
        torch.library.opcheck(ops.select_blocks_by_max, (q, arguments[1], 4, *CHOICE, 2, offsets[1]))


def test_compiles_in_one_graph() -> None:
    (q, k, lse, *_), _ = draw(3)

    def both(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        own = public.select_blocks(q, k, lse, stride=4, kernel_size=8, block_size=16, n_keys=q.shape[2], top_k=3)
        return own, public.select_blocks_by_max(q, k, block_size=4, top_k=3, q_offset=0)

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for mine, other in zip(compiled(q, k, lse), both(q, k, lse)):
        assert torch.equal(mine, other)


def test_defaults_and_wrong_arguments() -> None:
    (q, k, lse, *_), _ = draw(4)
    given: dict[str, Any] = {"stride": 4, "kernel_size": 8, "block_size": 16, "n_keys": 40, "top_k": 4}
    expected = reference.select_blocks(q, k, lse, 0.25, 4, 7, 0, 8, 16, 40, 4, 1, 2)
    assert torch.equal(public.select_blocks(q, k, lse, **given), expected)
    for wrong, error, sentence in (
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"top_k": 2}, ValueError, r"top_k must be at least 1 and n_init \+ n_local = 3, got 2"),
        ({"n_local": -1}, ValueError, "n_local must be at least 0"),
        ({"lse": lse[:, :1]}, ValueError, "lse must be"),
        ({"lse": lse.half()}, TypeError, "lse must be float32 or float64"),
        ({"q_offset": None}, ValueError, "q_offset must be an int"),
        ({"k_cmp": k.double()}, TypeError, "k_cmp must have q's dtype"),
    ):
        with pytest.raises(error, match=sentence):
            public.select_blocks(**{"q": q, "k_cmp": k, "lse": lse, **given, **wrong})
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        public.select_blocks_by_max(q, k, block_size=0, top_k=2)
