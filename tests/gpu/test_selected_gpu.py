"""Selected attention's kernels on a GPU: real sizes, real atomics, graphs, determinism, memory, large logits.

Where the dense oracle would not fit, single rows are recomputed in float64 (`row_reference`).
"""

from __future__ import annotations

import pytest
import torch

from selected_oracle import attend, error, gradients, random_lists

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", reason="the kernels under test are written in Triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fsa_compile.kernels.triton import launch  # noqa: E402
from fsa_compile.kernels.triton.selected_attention import (  # noqa: E402
    selected_attention_backward,
    selected_attention_forward,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DEVICE = torch.device("cuda")


def draw(seed, b, hq, hkv, n, dk=128, dv=128, dtype=torch.bfloat16, m=None):
    """Random q, k, v, dout (b, h, n, d) and dlse on the device, and the generator."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    m = n if m is None else m
    shapes = (b, hq, n, dk), (b, hkv, m, dk), (b, hkv, m, dv), (b, hq, n, dv)
    q, k, v, dout = (torch.randn(s, generator=g, device=DEVICE).to(dtype) for s in shapes)
    return q, k, v, dout, torch.randn(b, hq, n, generator=g, device=DEVICE), g


def nsa_lists(g, b, hi, n, t, block_size):
    """(b, hi, n, t) as NSA selects: first block, own block, the one before, and random earlier ones; ascending, -1 last."""
    blocks = -(-n // block_size)
    lists = torch.empty(b, hi, n, t, dtype=torch.int32, device=DEVICE)
    block = torch.arange(blocks, device=DEVICE)
    for begin in range(0, n, 4096):
        own = (torch.arange(begin, min(begin + 4096, n), device=DEVICE) // block_size)[:, None]
        score = torch.rand(b, hi, len(own), blocks, generator=g, device=DEVICE)
        score = score.masked_fill(block > own, -1.0).masked_fill((block == 0) | (block == own) | (block == own - 1), 2.0)
        value, chosen = score.topk(min(t, blocks), -1)
        chosen = torch.where(value < 0, blocks, chosen).sort(-1).values
        lists[:, :, begin : begin + len(own), : chosen.shape[-1]] = torch.where(chosen == blocks, -1, chosen).int()
        lists[:, :, begin : begin + len(own), chosen.shape[-1] :] = -1
    return lists


def run(q, k, v, dout, dlse, indices, block_size, rule="causal", scale=None, offset=0, offsets=None):
    """out, lse, dq, dk, dv of the kernels."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (indices, block_size, scale, rule, offset, offsets)
    out, lse = selected_attention_forward(q, k, v, *args)
    return out, lse, *selected_attention_backward(dout, dlse, q, k, v, out, lse, *args)


def check_dense(tensors, indices, block_size, rule="causal", offset=0, scale=None, factor=1.0):
    """All five results against the dense oracle."""
    q, k, v, dout, dlse = tensors
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    got = run(*tensors, indices, block_size, rule, scale, offset)
    offsets = torch.full((q.shape[0],), offset)
    out, lse = attend(q, k, v, indices, block_size, scale, rule, offsets)
    tolerance = factor * TOLERANCE[q.dtype]
    assert error(got[0], out) < tolerance
    empty = lse == float("-inf")
    assert torch.equal(got[1] == float("-inf"), empty)
    assert (got[1] - lse)[~empty].abs().max() < 1e-5 * (1 + lse[~empty].abs().max())
    for x, want in zip(got[2:], gradients(q, k, v, indices, block_size, scale, rule, offsets, dout, dlse)):
        assert error(x, want) < tolerance


def row_reference(q, k, v, indices, block_size, batch, head, query):
    """out (dv,) of one causal row in float64, with query, key and value leaves for its gradients."""
    group, per_list = q.shape[1] // k.shape[1], q.shape[1] // indices.shape[1]
    blocks = indices[batch, head // per_list, query].long().unique()
    keys = (blocks[blocks >= 0][:, None] * block_size + torch.arange(block_size, device=DEVICE)).flatten()
    keys = keys[(keys <= query) & (keys < k.shape[2])]
    row = q[batch, head, query].double().requires_grad_()
    logits = k[batch, head // group, keys].double() @ row * q.shape[-1] ** -0.5
    return logits.softmax(0) @ v[batch, head // group, keys].double(), row


def check_rows(q, k, v, dout, indices, block_size, out, dq):
    """Single rows of out and dq against float64, early, late and in between, first and last head."""
    n, got, want = q.shape[2], [[], []], [[], []]
    for query in (0, 1, block_size - 1, block_size, n // 3, n // 2 + 1, n - 2, n - 1):
        for head in (0, q.shape[1] - 1):
            o, row = row_reference(q, k, v, indices, block_size, q.shape[0] - 1, head, query)
            (d,) = torch.autograd.grad(o, row, dout[-1, head, query].double())
            for kind, (x, y) in enumerate(((out[-1, head, query], o), (dq[-1, head, query], d))):
                got[kind].append(x.detach())
                want[kind].append(y.detach())
    for x, y in zip(got, want):
        assert error(torch.stack(x), torch.stack(y)) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rule", ["causal", "listed", "diagonal"])
def test_rules_and_dtypes(rule, dtype):
    """Lists with holes, repetitions and missing blocks; more keys than queries."""
    *tensors, g = draw(0, b=2, hq=8, hkv=2, n=700, m=900, dk=64, dv=64, dtype=dtype)
    indices = random_lists(torch.Generator().manual_seed(0), 2, 4, 700, 9, blocks=15).to(DEVICE)
    check_dense(tensors, indices, 64, rule, offset=200)


@pytest.mark.parametrize(
    "dims", [(16, 16), (40, 24), (32, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids="dk{0[0]}-dv{0[1]}".format
)
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_head_dims_and_blocks(dims, block_size):
    """Every padded size of the kernels."""
    *tensors, g = draw(1, b=1, hq=8, hkv=2, n=1000, dk=dims[0], dv=dims[1])
    check_dense(tensors, nsa_lists(g, 1, 2, 1000, 5, block_size), block_size)


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16, 64])
def test_groups(group):
    """One to 64 query heads per list, one of them no power of two."""
    *tensors, g = draw(2, b=1, hq=2 * group, hkv=2, n=513)
    check_dense(tensors, nsa_lists(g, 1, 2, 513, 4, 32), 32)


@pytest.mark.parametrize("block_size", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (128, 128)], ids=str)
def test_kernels_for_hopper(dims, group, block_size):
    """Items that end inside a tile, groups that do not fill one, lists too long for the dense kernel (all keys are masked)."""
    *tensors, _ = draw(group + block_size, 1, 2 * group, 2, 700, *dims)
    for slots in (5, 200):
        lists = random_lists(torch.Generator().manual_seed(slots), 1, 2, 700, slots, blocks=-(-700 // block_size))
        check_dense(tensors, lists.to(DEVICE), block_size)


@pytest.mark.parametrize("block_size", [64, 128])
def test_what_is_not_finite_stays_where_it_is_listed(block_size):
    """A query with infinite dO makes gradients of its own blocks NaN or infinite, and of no others."""
    q, k, v, dout, dlse, _ = draw(5, 1, 4, 1, 1024)
    blocks = 1024 // block_size
    lists = (torch.arange(1024, device=DEVICE) // block_size)[None, None, :, None].int()  # own blocks only
    dout[:, :, 0] = float("inf")
    *_, dk, dv = run(q, k, v, dout, dlse, lists.contiguous(), block_size)
    finite = torch.isfinite(dk.float()).all(-1).view(blocks, block_size).all(-1)
    assert finite[1:].all() and not finite[0]
    assert torch.isfinite(dv.float()[:, :, block_size:]).all()


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)], ids=["d64", "d256"])
def test_float32_is_ieee(dims):
    """No tf32: the error of float32 dots, at every tile that float32 gets."""
    *tensors, g = draw(3, b=1, hq=4, hkv=2, n=600, dk=dims[0], dv=dims[1], dtype=torch.float32)
    check_dense(tensors, nsa_lists(g, 1, 2, 600, 6, 64), 64)


@pytest.mark.parametrize("deviation", [16, 36, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(deviation, dtype):
    """Trap 5: also with an outlier in token 0, which every query lists."""
    q, k, v, dout, dlse, g = draw(4, b=1, hq=4, hkv=1, n=1024, dk=64, dv=64, dtype=dtype)
    k[:, :, 0] *= 20
    # float32: a logit x is known to 6e-8 x. bfloat16: dQ and dK cancel where the softmax is nearly one-hot.
    factor = 1 + deviation if dtype == torch.float32 else 4
    check_dense((q, k, v, dout, dlse), nsa_lists(g, 1, 1, 1024, 5, 64), 64, scale=deviation / 8, factor=factor)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_a_long_sequence(group, deterministic):
    """32k keys, several regions and slices; single rows are checked, and dK and dV by the sums they must have."""
    q, k, v, dout, _, g = draw(5, b=1, hq=4 * group, hkv=4, n=32768)
    indices = nsa_lists(g, 1, 4, 32768, 16, 64)
    torch.use_deterministic_algorithms(deterministic)
    try:
        out, lse, dq, dk, dv = run(q, k, v, dout, None, indices, 64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in (out, lse, dq, dk, dv))
    check_rows(q, k, v, dout, indices, 64, out, dq)
    # Probabilities of a row add up to 1, so dV adds up to dO; q . dQ and k . dK are the same sum of ds * logit.
    assert error(dv.double().sum(2), dout.double().unflatten(1, (4, group)).sum((2, 3))) < 2e-2
    left, right = (q.double() * dq.double()).sum(), (k.double() * dk.double()).sum()
    assert (left - right).abs() < 2e-2 * (q.double() * dq.double()).norm() * dq.shape[2] ** 0.5


def test_offsets_past_two_to_the_31():
    """Trap 10: q alone holds 2^31 + elements; the last rows are right."""
    n, hq = 131072 + 64, 128
    q, k, v, dout, _, g = draw(6, b=1, hq=1, hkv=1, n=n)
    q, dout = (x.expand(1, hq, n, 128).contiguous() for x in (q, dout))
    indices = nsa_lists(g, 1, 1, n, 2, 64).expand(1, 2, n, 2)
    assert q.numel() > 2**31
    out, _, dq, _, _ = run(q, k, v, dout, None, indices, 64)
    check_rows(q, k, v, dout, indices, 64, out, dq)
    assert torch.equal(out[:, 0, -1000:], out[:, -1, -1000:])


def test_deterministic_runs_agree_bit_for_bit():
    """Trap 12, with a block that every query lists."""
    *tensors, g = draw(7, b=2, hq=8, hkv=2, n=4096)
    indices = nsa_lists(g, 2, 4, 4096, 8, 64)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(*tensors, indices, 64)
        for _ in range(4):
            assert all(torch.equal(x, y) for x, y in zip(first, run(*tensors, indices, 64)))
    finally:
        torch.use_deterministic_algorithms(False)
    atomic = run(*tensors, indices, 64)
    assert torch.equal(first[0], atomic[0]) and all(error(x, y) < TOLERANCE[torch.bfloat16] for x, y in zip(atomic, first))


def test_cuda_graph():
    """Nothing waits for the device: a captured forward and backward follow new inputs, indices included."""
    q, k, v, dout, dlse, g = draw(8, b=1, hq=8, hkv=2, n=2048)
    indices = nsa_lists(g, 1, 2, 2048, 6, 64)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    run(q, k, v, dout, dlse, indices, 64, offsets=offsets)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k, v, dout, dlse, indices, 64, offsets=offsets)
    for _ in range(2):
        for x in (q, k, v, dout):
            x.normal_(generator=g)
        indices.copy_(nsa_lists(g, 1, 2, 2048, 6, 64))
        offsets.random_(0, 100, generator=g)
        graph.replay()
        fresh = run(q, k, v, dout, dlse, indices, 64, offsets=offsets)
        assert all(error(x, y) < 2e-3 for x, y in zip(captured, fresh))
        assert torch.equal(captured[0], fresh[0])


def test_poisoned_memory():
    """Trap 13: the allocator hands out NaN and wrong numbers; nothing of it is read."""
    *tensors, g = draw(9, b=1, hq=8, hkv=2, n=3000)
    indices = nsa_lists(g, 1, 2, 3000, 6, 64)
    indices[:, :, 100:200] = -1
    clean = run(*tensors, indices, 64)
    torch.cuda.empty_cache()
    junk = [torch.full((size,), float("nan"), device=DEVICE) for size in (1 << 10, 1 << 18, 1 << 22, 1 << 26) for _ in range(8)]
    del junk
    poisoned = run(*tensors, indices, 64)
    assert all(error(x, y) < 2e-3 for x, y in zip(poisoned[2:], clean[2:])) and torch.equal(poisoned[0], clean[0])
    assert not poisoned[0][:, :, 100:200].any() and (poisoned[1][:, :, 100:200] == float("-inf")).all()


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("skew", ["random", "hot"])
def test_scratch_memory(group, skew):
    """Trap 11: at 64k, whatever the skew, scratch is below 700 MiB; all queries listing the same blocks takes less than 4x."""
    n = 65536
    q, k, v, dout, _, g = draw(10, b=1, hq=4 * group, hkv=4, n=n)
    usual = nsa_lists(g, 1, 4, n, 16, 64)
    indices = torch.arange(16, device=DEVICE, dtype=torch.int32).expand(1, 4, n, 16) if skew == "hot" else usual

    def forward(x):
        return selected_attention_forward(q, k, v, x, 64, 128**-0.5, "causal", 0, None)

    def backward(x, out, lse):
        return selected_attention_backward(dout, None, q, k, v, out, lse, x, 64, 128**-0.5, "causal", 0, None)

    def growth(call, *args):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call(*args)
        kept = sum(x.numel() * x.element_size() for x in results)
        return results, torch.cuda.max_memory_allocated() - before - kept

    (out, lse), scratch = growth(forward, indices)
    assert scratch < 350 << 20
    grads, scratch = growth(backward, indices, out, lse)
    assert scratch < 700 << 20
    del grads
    assert milliseconds(forward, indices) < 4 * milliseconds(forward, usual)
    assert milliseconds(backward, indices, out, lse) < 4 * milliseconds(backward, usual, out, lse)


def milliseconds(call, *args):
    """Median device time of `call`."""
    from triton.testing import do_bench

    return do_bench(lambda: call(*args), warmup=5, rep=30, return_mode="median")


def test_launches_match_the_device():
    """The limit that `launch` reads is the device's, and the largest float32 tile of it really launches."""
    device = launch.device_of(torch.empty(0, device=DEVICE))
    assert device.shared_memory >= 99 << 10 and device.capability >= 80
    *tensors, g = draw(11, b=1, hq=64, hkv=1, n=200, dk=256, dv=256, dtype=torch.float32)
    check_dense(tensors, nsa_lists(g, 1, 1, 200, 3, 32), 32)
