"""Banded attention's kernels on a GPU through the ops: real sizes, bfloat16, graphs, determinism, head dims without a kernel.

The float64 oracle is dense; at n = 4096 it holds a few heads. Tolerances: see tests/kernels/test_triton_banded.py.
"""

from __future__ import annotations

import pytest
import torch

from banded_oracle import results
from selected_oracle import error

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", reason="the kernels under test are written in Triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fsa_compile.kernels import ops  # noqa: E402
from fsa_compile.kernels.triton.banded_attention import (  # noqa: E402
    BandRule,
    banded_attention_backward,
    banded_attention_forward,
    supports,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DEVICE = torch.device("cuda")
WINDOW, COMPRESSED = BandRule(window=512), BandRule(stride=16, last=31, prefix=1)


def draw(seed, rule, b=1, hq=4, hkv=2, n=4096, dk=128, dv=128, dtype=torch.bfloat16):
    """Random q, k, v, dout and dlse in (b, n, h, d) memory; as many keys as the rule has for n positions."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    m = n if rule.window is not None else rule.prefix + (n - rule.last - 1) // rule.stride + 1
    shapes = (b, n, hq, dk), (b, m, hkv, dk), (b, m, hkv, dv), (b, n, hq, dv)
    q, k, v, dout = (torch.randn(s, generator=g, device=DEVICE).to(dtype).transpose(1, 2) for s in shapes)
    return q, k, v, dout, torch.randn(b, hq, n, generator=g, device=DEVICE)


def apply(q, k, v, scale, rule):
    """out, lse of the op that the rule describes."""
    if rule.window is not None:
        return ops.sliding_window_attention(q, k, v, rule.window, scale, rule.q_offset, rule.q_offsets)
    return ops.compressed_attention(q, k, v, scale, rule.stride, rule.last, rule.prefix, rule.q_offset, rule.q_offsets)


def check(tensors, rule, scale=None, factor=1.0):
    """All five results of the op against the oracle."""
    *qkv, dout, dlse = tensors
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    assert supports(*qkv) is None
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, lse = apply(*leaves, scale, rule)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    want_out, want_lse, *want_grads = results(*qkv, dout, dlse, scale, rule)
    tolerance = factor * TOLERANCE[qkv[0].dtype]
    assert error(out.detach(), want_out) < tolerance
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert (lse - want_lse)[~empty].abs().max() < 1e-5 * (1 + want_lse[~empty].abs().max())
    for got, want in zip(grads, want_grads):
        assert error(got, want) < tolerance


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rule", [WINDOW, COMPRESSED], ids=["window", "compressed"])
def test_dtypes(rule, dtype):
    """4096 tokens, groups of two: many tiles, and for compressed keys several parts per tile."""
    check(draw(0, rule, dtype=dtype), rule)


@pytest.mark.parametrize(
    "dims", [(16, 16), (40, 24), (17, 72), (96, 96), (64, 64), (192, 128), (256, 256)], ids="dk{0[0]}-dv{0[1]}".format
)
@pytest.mark.parametrize("rule", [WINDOW, COMPRESSED], ids=["window", "compressed"])
def test_head_dims(rule, dims):
    """Every launch that `banded_launch` distinguishes by head dimension, and dimensions that `alignment` fills up."""
    check(draw(1, rule, n=1000, dk=dims[0], dv=dims[1]), rule)


@pytest.mark.parametrize("rule", [WINDOW, COMPRESSED], ids=["window", "compressed"])
def test_misaligned_memory(rule):
    """Rows of 65 elements that begin at an odd address: what slices of a packed projection look like."""
    q, k, v, dout, dlse = draw(8, rule, n=1000, dk=66, dv=66)
    check((*(x[..., 1:65] for x in (q, k, v, dout)), dlse), rule)


@pytest.mark.parametrize("heads", [(16, 1), (6, 2), (3, 3)], ids="hq{0[0]}-hkv{0[1]}".format)
def test_groups_and_batch_offsets(heads):
    """16, 2 and 1 heads in a tile; every batch row at positions of its own."""
    for rule in (BandRule(window=100), BandRule(stride=16, last=31, prefix=1)):
        rule = BandRule(**{**vars(rule), "q_offsets": torch.tensor([-60, 300], device=DEVICE)})
        check(draw(2, rule, b=2, hq=heads[0], hkv=heads[1], n=900), rule)


@pytest.mark.parametrize("rule", [WINDOW, COMPRESSED], ids=["window", "compressed"])
def test_large_logits(rule):
    """Logits of standard deviation 64; a logit x is known to 6e-8 x, and everything else to as much absolutely."""
    check(draw(3, rule, n=2048, dtype=torch.float32), rule, scale=64 * 128**-0.5, factor=65)


@pytest.mark.parametrize("rule", [WINDOW, COMPRESSED], ids=["window", "compressed"])
def test_graph_capture_and_determinism(rule):
    """Forward and backward replay in a CUDA graph, on new data, to the bits that a direct call gives."""
    q, k, v, dout, dlse = draw(4, rule)

    def step():
        out, lse = banded_attention_forward(q, k, v, 0.1, rule)
        return out, lse, *banded_attention_backward(dout, dlse, q, k, v, out, lse, 0.1, rule)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for x, y in zip((q, k, v, dout, dlse), draw(5, rule)):
        x.copy_(y)
    graph.replay()
    for x, y in zip(replayed, step()):
        assert torch.equal(x, y)


def test_head_dims_without_a_kernel_take_the_blocked_path():
    """A head dimension below 16, and float64."""
    for dtype, d in ((torch.float32, 8), (torch.float64, 32)):
        q, k, v, dout, dlse = draw(6, WINDOW, n=700, dk=d, dv=d, dtype=dtype)
        assert supports(q, k, v) is not None
        for rule in (WINDOW, COMPRESSED):
            got = apply(q, k, v, 0.3, rule)
            want = results(q, k, v, dout, None, 0.3, rule)
            assert error(got[0], want[0]) < TOLERANCE.get(dtype, 1e-5)


def test_a_window_takes_time_in_proportion_to_n():
    """64k tokens, 16 heads of 4: nothing grows with n * m, in time (generous) or in memory."""
    from triton.testing import do_bench

    q, k, v, dout, _ = draw(7, WINDOW, hq=16, hkv=4, n=65536)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = banded_attention_forward(q, k, v, 0.1, WINDOW)
    banded_attention_backward(dout, None, q, k, v, out, lse, 0.1, WINDOW)
    assert torch.cuda.max_memory_allocated() - before < q.nbytes + out.nbytes + k.nbytes + v.nbytes + (64 << 20)
    assert do_bench(lambda: banded_attention_forward(q, k, v, 0.1, WINDOW), warmup=5, rep=20) < 20
