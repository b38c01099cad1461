"""Random problems for the selection ops, and the judge of their results, shared by the tests on a CPU and on a GPU."""

from __future__ import annotations

import torch

from fsa_compile.kernels import reference


def draw(
    seed, b=1, hkv=2, group=2, n=40, d=16, stride=4, kernel_size=8, block_size=16, prefix=0, n_keys=None, q_offset=0,
    q_offsets=None, dtype=torch.float32, device="cpu",
):  # fmt: skip
    """q, k_cmp, lse and the arguments scale ... n_keys of `reference.select_blocks`, and its two offsets; lse from float64."""
    generator = torch.Generator(device).manual_seed(seed)
    n_keys = n + q_offset if n_keys is None else n_keys
    c = prefix + max(0, (n_keys - kernel_size) // stride + 1)
    q, k = (
        torch.randn(b, rows, h, d, generator=generator, device=device).to(dtype).transpose(1, 2)
        for h, rows in ((hkv * group, n), (hkv, c))
    )
    rule = d**-0.5, stride, kernel_size - 1, prefix
    lse = reference.compressed_attention(q.double(), k.double(), k.double(), *rule, q_offset, q_offsets)[1]
    lse = lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return (q, k, lse, *rule, kernel_size, block_size, n_keys), (q_offset, q_offsets)


def scores(q, k_cmp, lse, scale, stride, last, prefix, kernel_size, block_size, n_keys, q_offset=0, q_offsets=None):
    """What `reference.select_blocks` ranks, (b, hkv, n, blocks) float64, from an lse of its own."""
    q, k = q.double(), k_cmp.double().repeat_interleave(q.shape[1] // k_cmp.shape[1], 1)
    positions = reference.query_positions(q.shape[2], q_offset, q_offsets, q.device)
    visible = reference.compressed_visibility(positions, k.shape[2], stride, last, prefix)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    weights = torch.where(visible, logits.softmax(-1), 0.0).unflatten(1, (k_cmp.shape[1], -1)).sum(2)
    blocks = -(-n_keys // block_size)
    overlap = reference.block_overlap(k.shape[2] - prefix, blocks, stride, kernel_size, block_size, q.device)
    return weights[..., prefix:] @ overlap


def chosen(indices, blocks):
    """(b, h, n, blocks) boolean: the sets that lists of blocks describe. A list is ascending with -1 behind."""
    assert indices.dtype == torch.int32 and indices.is_contiguous() and indices.lt(blocks).all() and indices.ge(-1).all()
    later, earlier = indices[..., 1:], indices[..., :-1]
    assert ((later > earlier) | (later == -1)).all()
    listed = torch.zeros(*indices.shape[:3], blocks + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, indices.masked_fill(indices < 0, blocks).long(), True)[..., :blocks]


def largest_gap(actual, expected, score):
    """How much better, relatively, a block that was left out is than one that was taken instead; 0 where nothing differs."""
    actual, expected = chosen(actual, score.shape[-1]), chosen(expected, score.shape[-1])
    assert torch.equal(actual.sum(-1), expected.sum(-1))
    missed = torch.where(expected & ~actual, score, -torch.inf).amax(-1)
    taken = torch.where(actual & ~expected, score, torch.inf).amin(-1)
    differs = (actual != expected).any(-1)
    return float(((missed - taken) / missed)[differs].max()) if differs.any() else 0.0
