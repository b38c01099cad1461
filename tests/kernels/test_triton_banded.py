"""Banded attention's Triton kernels against a dense float64 oracle: interpreted on a CPU, compiled where there is a GPU.

Tolerances are norm-wise relative errors. float32: dots are IEEE, so a few hundred roundings of 6e-8 are all there is.
bfloat16 and float16: one rounding of the output (2^-9, 2^-12) plus one of P or dS before each dot.
"""

from __future__ import annotations

import pytest
import torch

from banded_oracle import results, visible
from selected_oracle import error

pytest.importorskip("triton", reason="the kernels under test are written in Triton")

from fsa_compile.kernels.triton import banded_backward, banded_launch, launch  # noqa: E402
from fsa_compile.kernels.triton.banded_attention import (  # noqa: E402
    BandRule,
    banded_attention_backward,
    banded_attention_forward,
    supports,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
RULES = {"window": BandRule(window=40), "compressed": BandRule(stride=4, last=7)}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every buffer that is not cleared starts with NaN."""
    allocate = torch.empty

    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=list(RULES))
def rule(request):
    """A window, and compressed keys."""
    return RULES[request.param]


def draw(seed, b=1, hq=2, hkv=1, n=60, m=None, dk=16, dv=16, dtype=torch.float32):
    """Random q, k, v, dout and dlse."""
    g = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    shapes = (b, hq, n, dk), (b, hkv, m, dk), (b, hkv, m, dv), (b, hq, n, dv)
    q, k, v, dout = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v, dout, torch.randn(b, hq, n, generator=g)


def to_device(rule):
    """The rule with its offsets on the device under test."""
    return rule if rule.q_offsets is None else BandRule(**{**vars(rule), "q_offsets": rule.q_offsets.to(DEVICE)})


def check(q, k, v, dout, dlse, rule, scale=None, tolerance=None):
    """Forward and backward of the kernels against the oracle; returns what the kernels gave, on the CPU."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    on = [None if x is None else x.to(DEVICE) for x in (q, k, v, dout, dlse)]
    out, lse = banded_attention_forward(*on[:3], scale, to_device(rule))
    grads = banded_attention_backward(on[3], on[4], *on[:3], out, lse, scale, to_device(rule))
    out, lse, *grads = (x.cpu() for x in (out, lse, *grads))
    want_out, want_lse, *want_grads = results(q, k, v, dout, dlse, scale, rule)
    assert (out.dtype, lse.dtype, [x.dtype for x in grads]) == (q.dtype, torch.float32, [q.dtype] * 3)
    assert all(x.is_contiguous() for x in (out, lse, *grads))
    assert error(out, want_out) < tolerance
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not (~empty).any() or (lse - want_lse)[~empty].abs().max() < tolerance * (1 + want_lse[~empty].abs().max())
    assert not out[empty].any() and not grads[0][empty].any()
    for got, want in zip(grads, want_grads):
        assert error(got, want) < tolerance
    return out, lse, grads


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (3, 1), (6, 1), (8, 2), (32, 1)], ids="hq{0[0]}-hkv{0[1]}".format)
def test_head_maps(heads, rule):
    """Groups of 1 to 32 query heads: in one tile, in several, and odd ones of which a tile takes one head."""
    check(*draw(0, hq=heads[0], hkv=heads[1], n=50 if heads[0] < 32 else 9), rule)


@pytest.mark.parametrize("window", [0, 1, 2, 31, 64, 65, 1000, 1 << 62])
def test_windows(window):
    """Nothing, the own key only, around a tile of keys, all but one, all, and more than there is."""
    check(*draw(1, m=65), BandRule(window=window, q_offset=5))


@pytest.mark.parametrize(
    "stride, last, prefix", [(1, 0, 0), (4, 3, 0), (4, 7, 1), (5, 31, 3), (16, 15, 40), (3, -4, 0), (1 << 40, 0, 1)]
)
def test_compressed_keys(stride, last, prefix):
    """Overlapping and disjoint keys, a prefix shorter and longer than a tile, a key that ends before the sequence starts."""
    check(*draw(2, m=prefix + 20), BandRule(stride=stride, last=last, prefix=prefix))


@pytest.mark.parametrize("n, m", [(1, 90), (33, 128), (130, 40), (64, 64), (7, 1)])
def test_lengths(n, m, rule):
    """Trap 8: more keys than queries and fewer, whole tiles and parts of them."""
    check(*draw(3, n=n, m=m), BandRule(**{**vars(rule), "q_offset": max(0, m - n)}))


@pytest.mark.parametrize("offset", [-200, -20, 0, 50, 500])
def test_positions(offset, rule):
    """Queries before the first key, inside, and beyond the last; one offset for all, and one per batch row."""
    check(*draw(4, b=2, m=90), BandRule(**{**vars(rule), "q_offset": offset}))
    check(*draw(4, b=2, m=90), BandRule(**{**vars(rule), "q_offsets": torch.tensor([offset, 13])}))


@pytest.mark.parametrize("dims", [(24, 40), (192, 128), (256, 256)], ids="dk{0[0]}-dv{0[1]}".format)
def test_head_dims(dims, rule):
    """Trap 9: dk != dv, dims that are no power of two, and the largest."""
    check(*draw(5, n=40, dk=dims[0], dv=dims[1]), rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, rule):
    """Statistics stay float32. The tiles are 128 rows by 64 keys here, so that a window spans several."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; tests/gpu covers bfloat16")
    check(*draw(6, hq=4, hkv=2, n=150, m=200, dk=32, dv=32, dtype=dtype), BandRule(**{**vars(rule), "q_offset": 50}))


@pytest.mark.parametrize("prefix", [0, 2])
def test_empty_rows_are_never_read(prefix):
    """Trap 4: queries before the first compressed key; out = 0, lse = -inf, gradients 0, even for a NaN gradient of lse."""
    q, k, v, dout, dlse = draw(7, m=18)
    rule = BandRule(stride=4, last=40, prefix=prefix)
    empty = ~visible(rule, 60, 18, q.device).any(-1)[0, 0]
    assert empty.sum() == (0 if prefix else 40)
    _, lse, grads = check(q, k, v, dout, dlse, rule)
    dlse[..., empty] = float("nan")
    on = [x.to(DEVICE) for x in (dout, dlse, q, k, v)]
    again = banded_attention_backward(*on, *banded_attention_forward(*on[2:], 0.25, rule), 0.25, rule)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(again, grads))


@pytest.mark.parametrize("deviation", [16, 36, 64, 1000])
def test_large_logits(deviation, rule):
    """Trap 5: logits of a large standard deviation, and an outlier in token 0."""
    q, k, v, dout, dlse = draw(8)
    k[:, :, 0] *= 20
    # A logit x is known to 6e-8 x: probabilities, and with them everything else, to as much absolutely.
    check(q, k, v, dout, dlse, rule, scale=deviation * 0.25, tolerance=1e-5 + 1e-5 * deviation)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale, rule):
    """Forward takes a row's maximum before it scales."""
    check(*draw(14), rule, scale=scale)


def test_lse_gradients_alone_and_absent(rule):
    """dlse without dout, and dout without dlse."""
    q, k, v, dout, dlse = draw(9)
    check(q, k, v, torch.zeros_like(dout), dlse, rule)
    check(q, k, v, dout, None, rule)


@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 0, 8), (1, 8, 0)], ids=["b0", "n0", "m0"])
def test_empty_tensors(shape, rule):
    """Traps 7 and 14: no batch rows, queries or keys."""
    b, n, m = shape
    q, k, v, dout, dlse = (x.to(DEVICE) for x in draw(10, b=b, n=n, m=m))
    out, lse = banded_attention_forward(q, k, v, 1.0, rule)
    assert out.shape == q.shape and not out.any() and (lse == float("-inf")).all()
    for x, grad in zip((q, k, v), banded_attention_backward(dout, dlse, q, k, v, out, lse, 1.0, rule)):
        assert grad.shape == x.shape and not grad.any()


def test_strides(rule):
    """Trap 14: (b, n, h, d) memory, a strided last dimension, expanded keys and gradients give the same."""
    q, k, v, dout, dlse = draw(11, b=2, hq=4, hkv=2, n=40)
    first = check(q, k, v, dout, dlse, rule)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    v, dout = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (v, dout))
    dlse = dlse.transpose(1, 2).contiguous().transpose(1, 2)
    second = check(q, k, v, dout, dlse, rule)
    for x, y in zip((*first[:2], *first[2]), (*second[:2], *second[2])):
        assert torch.equal(x, y)
    check(q, k[:, :1].expand_as(k), v, torch.ones(1, 1, 1, 1).expand_as(dout), None, rule)


def test_parts_of_a_tile_of_keys_add_up(monkeypatch, rule):
    """Whatever the number of parts, which here leaves some of them without queries, and whatever each key sees."""
    tensors = draw(12, m=40)
    monkeypatch.setattr(banded_backward, "query_splits", lambda *args: 1)
    whole = check(*tensors, rule)
    for parts in (2, 16):
        monkeypatch.setattr(banded_backward, "query_splits", lambda *args: parts)
        cut = check(*tensors, rule)
        assert torch.equal(whole[2][0], cut[2][0]) and all(error(x, y) < 1e-6 for x, y in zip(cut[2], whole[2]))


def test_query_splits_fill_the_device_within_their_memory():
    """64k tokens in compressed keys of stride 16 are cut, a window is not, and partials stay within their budget."""
    assert banded_launch.query_splits(programs=32 * 4, tiles=4096, copy_bytes=4096 * 4 * 256 * 4) == 8
    assert banded_launch.query_splits(programs=1024 * 4, tiles=33, copy_bytes=1 << 20) == 1
    assert banded_launch.query_splits(programs=8, tiles=15, copy_bytes=1) == 1
    assert banded_launch.query_splits(programs=8, tiles=1 << 20, copy_bytes=60 << 20) == 2
    assert banded_launch.query_splits(programs=1, tiles=1 << 20, copy_bytes=1) == 1024


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_launches_fit_every_device(dtype):
    """Tiles are powers of two of at least 16, the heads of a tile divide the group, shared memory suffices from 99 KiB on."""
    for limit in (99, 163, 227):
        for group in (1, 6, 12, 64):
            for dk, dv in ((16, 16), (64, 64), (128, 128), (192, 128), (256, 256)):
                device = launch.Device(90, limit << 10)
                shape = group, dk, dv, dtype, device
                for choice, memory in (
                    (banded_launch.forward_launch(*shape, window=True), banded_launch.forward_shared_memory),
                    (banded_launch.forward_launch(*shape, window=False), banded_launch.forward_shared_memory),
                    (banded_launch.dq_launch(*shape, window=True), banded_launch.dq_shared_memory),
                    (banded_launch.dq_launch(*shape, window=False), banded_launch.dq_shared_memory),
                    (banded_launch.dkv_launch(*shape, 512), banded_launch.dkv_shared_memory),
                    (banded_launch.dkv_launch(*shape, 4096), banded_launch.dkv_shared_memory),
                ):
                    assert min(choice.rows, choice.keys) >= 16 and choice.rows % choice.heads == 0 == group % choice.heads
                    padded = (launch.power_of_two(d, 16) for d in (dk, dv))
                    assert memory(choice.rows, choice.keys, *padded, dtype.itemsize, choice.stages) <= limit << 10


def test_refusals_are_sentences():
    """What the kernels do not take is named, and raised by the entry points."""
    q, k, v, *_ = (x.to(DEVICE) for x in draw(13))
    assert supports(q, k, v) is None
    wide = torch.zeros(1, 1, 24, 512, device=DEVICE)
    for why, args in {
        "four-dimensional": (q[0], k, v),
        "belong together": (q, k[:, :, :5], v),
        "must divide": (q, k.expand(1, 3, 60, 16), v.expand(1, 3, 60, 16)),
        "one dtype": (q, k.half(), v),
        "float64": (q.double(), k.double(), v.double()),
        "head dimensions 512": (wide, wide, wide),
        "head dimensions 8": (q[..., :8], k[..., :8], v),
    }.items():
        assert why in supports(*args)
        with pytest.raises(ValueError, match=why):
            banded_attention_forward(*args, 1.0, BandRule(window=4))
    with pytest.raises(ValueError, match="stride must be at least 1"):
        banded_attention_forward(q, k, v, 1.0, BandRule(stride=0))
