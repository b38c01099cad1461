"""Selected attention's Triton kernels against a dense float64 oracle: interpreted on a CPU, compiled where there is a GPU.

Tolerances are norm-wise relative errors. float32: dots are IEEE, so a few hundred roundings of 6e-8 are all there is.
bfloat16 and float16: one rounding of the output (2^-9, 2^-12) plus one of P or dS before each dot.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from selected_oracle import attend, error, gradients, random_lists

pytest.importorskip("triton", reason="the kernels under test are written in Triton")

from fsa_compile.kernels.triton import launch, plan, selected_attention, selected_backward, selected_forward  # noqa: E402
from fsa_compile.kernels.triton.selected_attention import (  # noqa: E402
    selected_attention_backward,
    selected_attention_forward,
    supports,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every buffer that is not cleared starts with NaN, or with integers that point at the wrong place."""
    allocate = torch.empty

    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    """Both variants of backward; the switch is put back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def draw(seed, b=1, hq=2, hkv=1, n=24, m=None, dk=16, dv=16, dtype=torch.float32):
    """Random q, k, v, dout, dlse and the generator, for more."""
    g = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    shapes = (b, hq, n, dk), (b, hkv, m, dk), (b, hkv, m, dv), (b, hq, n, dv)
    q, k, v, dout = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v, dout, torch.randn(b, hq, n, generator=g), g


def check(q, k, v, dout, dlse, indices, block_size, rule="causal", offset=None, offsets=None, scale=None, tolerance=None):
    """Forward and backward of the kernels against the oracle; returns what the kernels gave, on the CPU."""
    offset = k.shape[2] - q.shape[2] if offset is None else offset
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    on = [None if x is None else x.to(DEVICE) for x in (q, k, v, dout, dlse, indices, offsets)]
    args = (on[5], block_size, scale, rule, offset, on[6])
    out, lse = selected_attention_forward(*on[:3], *args)
    grads = selected_attention_backward(on[3], on[4], *on[:3], out, lse, *args)
    out, lse, grads = out.cpu(), lse.cpu(), [x.cpu() for x in grads]
    shift = torch.full((q.shape[0],), offset) if offsets is None else offsets
    want_out, want_lse = attend(q, k, v, indices, block_size, scale, rule, shift)
    assert (out.dtype, lse.dtype, [x.dtype for x in grads]) == (q.dtype, torch.float32, [q.dtype] * 3)
    assert error(out, want_out) < tolerance
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert (lse - want_lse)[~empty].abs().max() < tolerance * (1 + want_lse[~empty].abs().max())
    assert not out[empty].any() and not grads[0][empty].any()
    for got, want in zip(grads, gradients(q, k, v, indices, block_size, scale, rule, shift, dout, dlse)):
        assert error(got, want) < tolerance
    return out, lse, grads


@pytest.mark.parametrize("rule", ["causal", "listed", "diagonal"])
def test_rules_with_holes_repetitions_and_missing_blocks(rule, deterministic):
    """Traps 1 to 3 and 8: lists hold -2 ... blocks + 1 in any order, and there are more keys than queries."""
    *tensors, g = draw(0, b=2, hq=4, hkv=1, n=19, m=37, dk=16, dv=32)
    indices = random_lists(g, 2, 2, 19, 4, blocks=3)
    check(*tensors, indices, 16, rule)


@pytest.mark.parametrize(
    "heads",
    [(1, 1, 1), (2, 2, 2), (3, 1, 1), (6, 2, 2), (4, 1, 4), (8, 2, 4), (64, 1, 1)],
    ids="hq{0[0]}-hkv{0[1]}-hi{0[2]}".format,
)
def test_head_maps(heads):
    """Groups of 1 to 64 query heads per list, and several lists per key/value head."""
    hq, hkv, hi = heads
    *tensors, g = draw(1, hq=hq, hkv=hkv, n=9, m=32)
    check(*tensors, random_lists(g, 1, hi, 9, 2, blocks=2), 16)


@pytest.mark.parametrize("dims", [(32, 32), (96, 64), (192, 128), (24, 40)], ids="dk{0[0]}-dv{0[1]}".format)
def test_head_dims(dims):
    """Trap 9: dk != dv, and dims that are no power of two."""
    *tensors, g = draw(2, hq=2, n=8, m=32, dk=dims[0], dv=dims[1])
    check(*tensors, random_lists(g, 1, 1, 8, 2, blocks=2), 16)


def test_the_largest_head_dim(deterministic):
    """dk = dv = 256 leaves room for small tiles of keys only: several per block in both kernels."""
    *tensors, g = draw(3, hq=2, n=6, m=64, dk=256, dv=256)
    check(*tensors, random_lists(g, 1, 1, 6, 2, blocks=1), 64)


@pytest.mark.parametrize("block_size", [8, 24, 128, 256])
def test_block_sizes(block_size):
    """Smaller than a dot takes, no power of two, and larger than a tile of keys."""
    *tensors, g = draw(4, n=10, m=260)
    check(*tensors, random_lists(g, 1, 1, 10, 3, blocks=-(-260 // block_size)), block_size, "diagonal")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Trap 6: partials in the input dtype are normalised first, statistics stay float32."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; tests/gpu covers bfloat16")
    *tensors, g = draw(5, hq=4, hkv=2, n=20, m=64, dk=32, dv=32, dtype=dtype)
    check(*tensors, random_lists(g, 1, 2, 20, 3, blocks=4), 16)


def test_int64_lists():
    """Indices as `torch.topk` returns them; a huge number must not wrap into a block."""
    *tensors, g = draw(6, m=48)
    indices = random_lists(g, 1, 1, 24, 3, blocks=3, dtype=torch.int64)
    indices[..., 0] = torch.where(indices[..., 0] == 0, 2**32, indices[..., 0])
    indices[..., 1] = torch.where(indices[..., 1] == 0, -(2**40), indices[..., 1])
    check(*tensors, indices, 16)


@pytest.mark.parametrize("indices", ["nothing", "future", "mixed"])
def test_empty_rows(indices, deterministic):
    """Trap 4: no block listed, only blocks of the future, or every other row; out = 0, lse = -inf, gradients 0."""
    q, k, v, dout, dlse, _ = draw(7, n=32)
    lists = {"nothing": torch.full((1, 1, 32, 2), -1), "future": torch.full((1, 1, 32, 2), 1), "mixed": torch.zeros(1, 1, 32, 2)}
    lists = lists[indices].int()
    if indices == "mixed":
        lists[:, :, ::2] = -1
    dlse = torch.where(lists[:, 0, :, 0].expand(1, 2, 32) < 0, float("nan"), dlse)  # nobody may read it
    if indices != "nothing":
        check(q, k, v, dout, torch.nan_to_num(dlse), lists, 16)
    out, lse = selected_attention_forward(*(x.to(DEVICE) for x in (q, k, v, lists)), 16, 0.25, "causal", 0, None)
    grads = selected_attention_backward(
        *(x.to(DEVICE) for x in (dout, dlse, q, k, v, out, lse, lists)), 16, 0.25, "causal", 0, None
    )
    unseen = (lse == float("-inf")).cpu()
    assert unseen.any() and not out.cpu()[unseen].any() and not grads[0].cpu()[unseen].any()
    assert not any(x.isnan().any() for x in (out, lse, *grads))
    if indices == "nothing":
        assert not any(x.any() for x in grads)


@pytest.mark.parametrize("deviation", [16, 36, 64, 1000])
def test_large_logits(deviation):
    """Trap 5: logits of a large standard deviation, and an outlier in token 0 that every query lists."""
    q, k, v, dout, dlse, g = draw(8, n=32, m=32)
    k[:, :, 0] *= 20
    indices = random_lists(g, 1, 1, 32, 2, blocks=2)
    indices[..., 0] = 0
    # A logit x is known to 6e-8 x: probabilities, and with them everything else, to as much absolutely.
    check(q, k, v, dout, dlse, indices, 16, scale=deviation * 0.25, tolerance=1e-5 + 1e-5 * deviation)


@pytest.mark.parametrize("offset", [-20, 0, 5, 100])
def test_positions(offset):
    """Trap 8: queries before the first key, inside, and beyond the last; one offset for all, and one per batch row."""
    *tensors, g = draw(9, b=2, n=17, m=40)
    indices = random_lists(g, 2, 1, 17, 3, blocks=3)
    if offset >= 0:
        check(*tensors, indices, 16, "diagonal", offset=offset)
    check(*tensors, indices, 16, "causal", offsets=torch.tensor([offset, 23]))


@pytest.mark.parametrize("shape", [(0, 8, 8, 2), (1, 0, 8, 2), (1, 8, 0, 2), (1, 8, 8, 0)], ids=["b0", "n0", "m0", "t0"])
def test_empty_tensors(shape):
    """Trap 7 and 14: no batch rows, queries, keys or slots."""
    b, n, m, t = shape
    q, k, v, dout, dlse, _ = draw(10, b=b, n=n, m=m)
    args = (torch.zeros(b, 1, n, t, dtype=torch.int32, device=DEVICE), 16, 1.0, "causal", 0, None)
    q, k, v, dout, dlse = (x.to(DEVICE) for x in (q, k, v, dout, dlse))
    out, lse = selected_attention_forward(q, k, v, *args)
    assert out.shape == q.shape and not out.any() and (lse == float("-inf")).all()
    for x, grad in zip((q, k, v), selected_attention_backward(dout, dlse, q, k, v, out, lse, *args)):
        assert grad.shape == x.shape and not grad.any()


def test_a_single_short_block():
    """Trap 7: fewer keys than a block, one head, one slot."""
    *tensors, _ = draw(11, hq=1, n=5)
    check(*tensors, torch.zeros(1, 1, 5, 1, dtype=torch.int32), 64)


def test_strides():
    """Trap 14: (b, n, h, d) memory, one list per query block and for all heads by expansion, expanded gradients, d strided."""
    q, k, v, dout, dlse, g = draw(12, b=2, hq=4, hkv=2, n=32, dk=16, dv=16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    per_block = random_lists(g, 2, 1, 2, 3, blocks=2)
    indices = per_block[:, :, :, None].expand(2, 2, 2, 16, 3).reshape(2, 2, 32, 3)[:, :1].expand(2, 2, 32, 3)
    first = check(q, k, v, dout, dlse, indices, 16)
    by_slot = indices.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    strided = v.transpose(2, 3).contiguous().transpose(2, 3)
    second = check(q, k, strided, dout, dlse, by_slot, 16)
    assert torch.equal(first[0], second[0])
    check(q, k, v, torch.ones(1, 1, 1, 1).expand_as(dout), None, indices, 16)


def test_slices_and_ranges_of_lanes_change_nothing(monkeypatch, deterministic):
    """Tiny memory budgets: several plans, several ranges of lanes and slices each, the last slice short."""
    q, k, v, dout, dlse, g = draw(13, b=2, hq=4, hkv=2, n=50)
    indices = random_lists(g, 2, 2, 50, 3, blocks=4)
    whole = check(q, k, v, dout, dlse, indices, 16)
    made = []
    build = plan.build_plan
    for module in (selected_forward, selected_backward):
        monkeypatch.setattr(module, "build_plan", lambda *args, **named: made.append(build(*args, **named)) or made[-1])
        monkeypatch.setattr(module, "WHOLE_BYTES", 0)
        monkeypatch.setattr(module, "PLAN_BYTES", 6000)
    monkeypatch.setattr(selected_forward, "PARTIAL_BYTES", 8192)
    monkeypatch.setattr(selected_backward, "GRADIENT_BYTES", 8192)
    monkeypatch.setattr(selected_backward, "DKV_BYTES", 4096)
    sliced = check(q, k, v, dout, dlse, indices, 16)
    assert len(made) >= 4 and all(p.slices > 1 for p in made)
    assert error(sliced[0], whole[0]) < 1e-6 and all(error(x, y) < 1e-6 for x, y in zip(sliced[2], whole[2]))


def test_deterministic_runs_agree_bit_for_bit():
    """Trap 12. Interpreted atomics are ordered, so on a CPU this only shows that the variant exists; see tests/gpu."""
    q, k, v, dout, dlse, g = draw(14, hq=4, n=40)
    indices = random_lists(g, 1, 1, 40, 3, blocks=3)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (check(q, k, v, dout, dlse, indices, 16) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip((*first[:2], *first[2]), (*second[:2], *second[2])))


@pytest.mark.parametrize("dense_queries", [0, 16])
@pytest.mark.parametrize("stable", [False, True])
def test_plan_holds_every_entry_once(stable, dense_queries):
    """Items of a segment and dense lists name each (query, block) pair exactly once; items are short and under the bound."""
    g = torch.Generator().manual_seed(15)
    indices = random_lists(g, 2, 2, 45, 5, blocks=6)
    indices[..., 2] = 0  # a hot block
    where = plan.Positions(3)
    p = plan.build_plan(
        indices.to(DEVICE), range(1, 4), 6 * 8, 8, "causal", where, 16, 4, 2, stable=stable, dense_queries=dense_queries
    )
    assert (p.slices, p.capacity) == (3, 16 * 5 // 4 + 6) and (p.dense is None) == (dense_queries == 0)
    for lane in range(3):
        lists = indices.flatten(0, 1)[1 + lane].tolist()
        for index in range(p.slices):
            count = p.item_starts[lane, index, -1].item()
            assert count <= p.capacity
            got = []
            items = (x[lane, index, :count].tolist() for x in (p.item_block, p.item_first, p.item_length))
            for block, first, length in zip(*items):
                assert 1 <= length <= 4
                pairs = p.order[lane, index, first : first + length].tolist()
                assert not stable or pairs == sorted(pairs)
                assert all(lists[index * 16 + x // 5][x % 5] == block for x in pairs)
                got += [(x // 5, block) for x in pairs]
            rows = range(index * 16, min(45, index * 16 + 16))
            want = {(i - index * 16, j) for i in rows for j in lists[i] if 0 <= j < 6 and j * 8 <= i + 3}
            if dense_queries:
                several = p.dense.count[lane, index].item()
                blocks, members = (x[lane, index, :several].tolist() for x in (p.dense.block, p.dense.members))
                dense = [(i, j) for j, bits in zip(blocks, members) for i in range(16) if bits >> i & 1]
                assert 0 in blocks and all((i, j) in want for i, j in dense)
                assert all((i, (index * 16 + i + 3) // 8) not in got for i, _ in dense)  # own blocks are always dense
                got += dense
            assert sorted(got) == sorted(want)


def test_long_lists_have_no_dense_blocks():
    """Lists too long to be sorted by tiles of queries leave every block to the partials."""
    *tensors, g = draw(17, n=6, m=160)
    check(*tensors, random_lists(g, 1, 1, 6, 200, blocks=10), 16)


def test_dense_blocks_alone_and_entries_alone():
    """A hot selection leaves the partials nothing; blocks that one query in 16 lists leave the dense loop nothing."""
    *tensors, g = draw(18, n=32, m=256)
    check(*tensors, torch.arange(3).int().expand(1, 1, 32, 3), 16, "listed", offset=0)
    check(*tensors, (torch.arange(32).int() % 16).view(1, 1, 32, 1), 16, "listed", offset=0)


def test_refusals_are_sentences():
    """What the kernels do not take is named, and raised by the entry points."""
    q, k, v, *_ = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in draw(16))
    indices = torch.zeros(1, 1, 24, 2, dtype=torch.int32, device=DEVICE)
    assert supports(q, k, v, indices, 16) is None
    wide = torch.zeros(1, 1, 24, 512, device=DEVICE)
    for why, args in {
        "four-dimensional": (q[0], k, v, indices, 16),
        "belong together": (q, k[:, :, :5], v, indices, 16),
        "must divide": (q, k, v, indices.expand(1, 3, 24, 2), 16),
        "one dtype": (q, k.half(), v, indices, 16),
        "float64": (q.double(), k.double(), v.double(), indices, 16),
        "int32 or int64": (q, k, v, indices.short(), 16),
        "head dimensions 512": (wide, wide, v, indices, 16),
        "block size 512": (q, k, v, indices, 512),
        "65 query heads": (q[:, :1].expand(1, 65, 24, 16), k, v, indices, 16),
        "2000 blocks": (q, k, v, indices[..., :1].expand(1, 1, 24, 2000), 16),
    }.items():
        assert why in supports(*args)
        with pytest.raises(ValueError, match=why):
            selected_attention_forward(*args, 1.0, "causal", 0, None)
    with pytest.raises(ValueError, match="rule must be one of"):
        selected_attention_forward(q, k, v, indices, 16, 1.0, "causl", 0, None)


def test_cut_covers_every_lane_once():
    """Whole multiples, within the budget unless one multiple is already beyond it."""
    cases = [(range(12), 10, 1000, 1), (range(3, 12), 10, 85, 3), (range(12), 10, 25, 4), (range(0), 1, 1, 1)]
    for lanes, size, budget, multiple in cases:
        parts = list(plan.cut(lanes, size, budget, multiple))
        assert [x for part in parts for x in part] == list(lanes)
        assert all(len(part) % multiple == 0 and len(part) * size <= max(budget, size * multiple) for part in parts)


@pytest.mark.parametrize("capability, kib", [(89, 99), (80, 163), (90, 227), (100, 227)])
def test_launches_fit_or_are_refused(capability, kib, monkeypatch):
    """Tiles are legal for `tl.dot` and hold whole groups; what does not fit at the smallest tile is refused."""
    device = launch.Device(capability, kib << 10)
    monkeypatch.setattr(selected_attention, "device_of", lambda x: device)
    dims = [(d, d) for d in (16, 64, 96, 128, 192, 256)] + [(192, 128), (64, 256)]
    for group, block_size, (dk, dv), dtype in itertools.product(
        (1, 3, 4, 16, 64), (16, 48, 64, 256), dims, (torch.float32, torch.bfloat16)
    ):
        q, k, v = (torch.zeros(1, h, 1, d, dtype=dtype, device=DEVICE) for h, d in ((group, dk), (1, dk), (1, dv)))
        why = supports(q, k, v, torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=DEVICE), block_size)
        assert why is None or "shared memory" in why
        assert why is None or (group == 64 and kib < 227)
        fits = True
        for choose, memory in (
            (launch.forward_launch, launch.forward_shared_memory),
            (launch.backward_launch, launch.backward_shared_memory),
        ):
            x = choose(group, block_size, dk, dv, dtype, device)
            assert min(x.rows, x.keys) >= 16 and x.rows & (x.rows - 1) == x.keys & (x.keys - 1) == 0
            assert x.queries == x.rows // group >= 1 and x.item_queries % x.queries == 0
            d, e = launch.power_of_two(dk, 16), launch.power_of_two(dv, 16)
            fits = fits and memory(x.rows, x.keys, d, e, dtype.itemsize, x.stages) <= device.shared_memory
        assert fits == (why is None)
