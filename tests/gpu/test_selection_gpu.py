"""Choosing blocks on a GPU: 16-bit lists differ from float64's only where float64 scores differ by less than 1e-5."""

from __future__ import annotations

import pytest
import torch

from selection_oracle import draw, largest_gap, scores

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", reason="the kernels under test are written in Triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fsa_compile.kernels import ops, reference  # noqa: E402
from fsa_compile.kernels.triton import block_selection  # noqa: E402

NSA = {"stride": 16, "kernel_size": 32, "block_size": 64, "device": "cuda"}
CHOICE = (16, 1, 2)


def gap(arguments, offsets, choice=CHOICE):
    """`largest_gap` of the op against the float64 oracle."""
    assert block_selection.select_blocks_supports(*arguments, *choice, *offsets) is None
    got = ops.select_blocks(*arguments, *choice, *offsets)
    q, k, _, scale, *rest = arguments
    lse = reference.compressed_attention(q.double(), k.double(), k.double(), scale, *rest[:3], *offsets)[1]
    want = reference.select_blocks(q.double(), k.double(), lse, scale, *rest, *choice, *offsets)
    return largest_gap(got, want, scores(*arguments, *offsets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [1, 4, 6, 16])
def test_lists(group, dtype):
    """Groups in one tile, odd ones, and large ones; 4096 tokens in 64 blocks."""
    assert gap(*draw(0, hkv=2, group=group, n=4096, d=128, dtype=dtype, **NSA)) < 1e-5


@pytest.mark.parametrize("d", [64, 96, 192, 256])
def test_head_dims(d):
    """Every launch that depends on the head dimension."""
    assert gap(*draw(1, hkv=1, group=4, n=2048, d=d, dtype=torch.bfloat16, **NSA)) < 1e-5


def test_every_width_and_sections():
    """Rows of 128 to 1024 blocks, and 1500 blocks in two sections."""
    for tokens in (16000, 32000, 60000, 96000):
        problem = draw(2, hkv=1, group=4, n=128, q_offset=tokens - 128, d=64, dtype=torch.bfloat16, **NSA)
        assert gap(*problem) < 1e-5


def test_runs_in_a_graph_and_twice_the_same():
    """Nothing waits for the device, and two runs agree."""
    arguments, offsets = draw(3, hkv=2, group=4, n=4096, d=128, dtype=torch.bfloat16, **NSA)
    expected = ops.select_blocks(*arguments, *CHOICE, *offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.select_blocks(*arguments, *CHOICE, *offsets)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_the_second_rule():
    """MiniMax-M3's sizes: blocks of 128, 16 of them, indexer heads of their own."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(1, h, 8192, 128, generator=generator, device="cuda").bfloat16() for h in (4, 1))
    got = ops.select_blocks_by_max(q, k, 128, 16, 0, 1)
    logits = (q.double() @ k.double().transpose(-1, -2)).masked_fill(
        torch.arange(8192, device="cuda") > torch.arange(8192, device="cuda")[:, None], -torch.inf
    )
    score = logits.unflatten(-1, (64, 128)).amax(-1)
    assert largest_gap(got, reference.select_blocks_by_max(q.double(), k.double(), 128, 16, 0, 1), score) < 1e-5
