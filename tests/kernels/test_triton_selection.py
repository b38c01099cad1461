"""The selection kernel against the oracle, interpreted on a CPU: what is chosen, ties, sections, sizes. tests/gpu has bfloat16.

Scores of random problems differ by more than float32 rounding, so that lists can be compared as they are; a problem in which two
scores were closer would fail `test_scores_are_apart`.
"""

from __future__ import annotations

import pytest
import torch
from selection_oracle import draw, scores

from fsa_compile.kernels import reference

pytest.importorskip("triton", reason="the kernels under test are written in Triton")

from fsa_compile.kernels.triton import block_selection, launch  # noqa: E402

CHOICE = (5, 1, 2)  # top_k, n_init, n_local
SHAPES = {
    "groups of two": {},
    "a group of five": {"hkv": 1, "group": 5},
    "one head": {"hkv": 1, "group": 1, "d": 24},
    "batch offsets": {"b": 2, "n": 9, "n_keys": 150, "q_offsets": torch.tensor([140, -4])},
    "cache": {"n": 3, "q_offset": 190},
    "queries behind the keys": {"n": 20, "q_offset": 60, "n_keys": 50},
    "memory tokens": {"prefix": 2, "n": 70},
    "keys apart": {"stride": 8, "kernel_size": 8},
    "keys of two blocks": {"stride": 4, "kernel_size": 20, "n": 70},
    "one key a block": {"stride": 16, "kernel_size": 32, "n": 100, "hkv": 1},
    "no key": {"n_keys": 5, "n": 5},
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every buffer that is not cleared starts with NaN, or with a number that is no block."""
    allocate = torch.empty

    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 1 << 30)

    monkeypatch.setattr(torch, "empty", poisoned)


def check(arguments, offsets, choice=CHOICE):
    """The kernel's lists are the oracle's; returns them."""
    got = block_selection.select_blocks(*arguments, *choice, *offsets)
    assert torch.equal(got, reference.select_blocks(*arguments, *choice, *offsets))
    return got


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    """Groups of one to five heads, the ways in which keys can lie in blocks, positions before, inside and behind the keys."""
    check(*draw(0, **shape))


@pytest.mark.parametrize("choice", [(1, 0, 0), (4, 0, 1), (3, 3, 0), (6, 2, 4), (17, 1, 2)])
def test_choices(choice):
    """Nothing forced, everything forced, more blocks than there are, more slots than the 16 of the least list."""
    check(*draw(1, n=90, hkv=1, block_size=8), choice)


def test_scores_are_apart():
    """Of the problems above: two scores of a query are equal or differ by more than rounding."""
    for shape in SHAPES.values():
        arguments, offsets = draw(0, **shape)
        ranked = scores(*arguments, *offsets).sort(-1, descending=True).values
        gaps = (ranked[..., :-1] - ranked[..., 1:]).flatten()
        assert not gaps[gaps > 1e-15].lt(1e-6).any()


def test_equal_scores_go_to_the_lower_block():
    """Keys of zero: all blocks between the first and the last visible key have one score, computed in one order."""
    (q, k, _, scale, *rest), offsets = draw(2, n=200, hkv=1, block_size=8)
    k = torch.zeros_like(k)
    lse = reference.compressed_attention(q, k, k, scale, *rest[:3])[1]
    got = block_selection.select_blocks(q, k, lse, scale, *rest, 6, 1, 2, *offsets)
    own = torch.arange(200)[64:] // 8
    expected = torch.stack([own * 0, own * 0 + 1, own * 0 + 2, own * 0 + 3, own - 1, own], -1)
    assert torch.equal(got[0, 0, 64:].long(), expected)


def test_scores_of_zero_are_ties_too():
    """One key takes all the probability, to the last bit: the other blocks are chosen from the front."""
    (q, k, _, scale, *rest), offsets = draw(3, n=150, hkv=1, group=1, block_size=8)
    q, k = torch.ones_like(q), torch.zeros_like(k)
    k[:, :, 20] = 1000.0  # tokens 80 ... 87, block 10
    lse = reference.compressed_attention(q, k, k, scale, *rest[:3])[1]
    got = check((q, k, lse, scale, *rest), offsets, (5, 1, 2))
    assert got[0, 0, 149].tolist() == [0, 1, 10, 17, 18]


@pytest.mark.parametrize("shape", [{"kernel_size": 4}, {"kernel_size": 2}], ids=["overlapping", "disjoint"])
def test_sections(shape, monkeypatch):
    """More blocks than a program keeps: the best of each section's best, and scores that reach across a section's end."""
    monkeypatch.setattr(block_selection, "SECTION", 128)
    check(*draw(4, hkv=1, n=6, stride=2, block_size=2, q_offset=700, **shape))


def test_tiles_of_a_program(monkeypatch):
    """One program takes all tiles in turn, and its scratch rows again and again."""
    monkeypatch.setattr(block_selection, "PROGRAMS", 1)
    monkeypatch.setattr(block_selection, "_multiprocessors", lambda x: 1)
    check(*draw(5, n=150, hkv=1, group=1))


@pytest.mark.parametrize("heads", [(2, 1), (3, 3)])
@pytest.mark.parametrize(("m", "offset", "block_size"), [(70, 0, 8), (67, 7, 16), (300, 250, 128), (5, 0, 1)])
def test_the_second_rule(heads, m, offset, block_size):
    """Negative scores, short last blocks, blocks of one key, offsets per batch row."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((heads[0], 40), (heads[1], m)))
    for offsets in (None, torch.tensor([offset, 3])):
        arguments = q, k, block_size, *CHOICE, offset, offsets
        assert torch.equal(block_selection.select_blocks_by_max(*arguments), reference.select_blocks_by_max(*arguments))


def test_strides_and_empty_tensors():
    """Expanded keys, a strided last dimension, an lse in float64; no batch row, no query."""
    (q, k, lse, *rest), offsets = draw(6, hkv=2, group=1)
    k = k[:, :1].expand(-1, 2, -1, -1)
    lse = reference.compressed_attention(q, k, k, *rest[:4])[1]
    strided = torch.stack([q, q], -1)[..., 0]
    assert strided.stride(-1) == 2
    check((strided, k, lse.double().transpose(1, 2).contiguous().transpose(1, 2), *rest), offsets)
    for x in (slice(0, 0), slice(None)), (slice(None), slice(None), slice(0, 0)):
        kept = k[x] if len(x) == 2 else k
        assert block_selection.select_blocks(q[x], kept, lse[x], *rest, *CHOICE, *offsets).shape == (*q[x].shape[:3], 5)


def test_refusals_are_sentences():
    """What the kernel does not take is named, and raised by the entry points."""
    arguments, offsets = draw(7)
    q, k, lse, scale, stride, last, prefix, kernel_size, block_size, n_keys = arguments
    assert block_selection.select_blocks_supports(*arguments, *CHOICE, *offsets) is None
    for why, changed in {
        "multiple of the stride": (q, k, lse, scale, 5, last, prefix, kernel_size, block_size, n_keys),
        "reaches into more than two blocks": (q, k, lse, scale, stride, last, prefix, 21, block_size, n_keys),
        "must be a power of two": (q, k, lse, scale, stride, last, prefix, kernel_size, 12, n_keys),
        "one dtype": (q.double(), k.double(), lse, scale, stride, last, prefix, kernel_size, block_size, n_keys),
        "too many for the rounds": (q, k, lse, scale, stride, last, prefix, kernel_size, block_size, 1 << 24),
    }.items():
        assert why in block_selection.select_blocks_supports(*changed, *CHOICE, *offsets)
        with pytest.raises(ValueError, match=why):
            block_selection.select_blocks(*changed, *CHOICE, *offsets)
    assert "must fit" in block_selection.select_blocks_supports(*arguments, 2, 1, 2, *offsets)
    with pytest.raises(ValueError, match="power of two up to 128"):
        block_selection.select_blocks_by_max(q, k, 256, *CHOICE, 0, None)
    wide = torch.zeros(1, 1, 8, 512)
    assert "head dimension 512" in block_selection.select_blocks_by_max_supports(wide, wide, 8, *CHOICE, 0, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_launches_fit_every_device(dtype):
    """Tiles hold whole groups and whole blocks, and shared memory suffices from 99 KiB on up to 128 dimensions."""
    for limit in (99, 163, 227):
        for heads in (1, 5, 16, 128):
            for per_block in (1, 4, 128):
                device = launch.Device(90, limit << 10)
                choice = block_selection.selection_launch(heads, per_block, 64, dtype, device)
                rows = choice.queries * choice.heads
                assert choice.heads >= heads and choice.queries >= 1 and choice.keys % per_block == 0
                needed = block_selection.shared_memory(rows, choice.keys, 64, dtype.itemsize, choice.stages)
                assert needed <= limit << 10 or (choice.keys, choice.stages) == (max(16, per_block), 1)
