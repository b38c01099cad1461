"""Which blocks of tokens a query attends to, blocked: the CPU path of the selection ops.

1. Cut the queries into chunks, and the keys of a chunk, a slice, to those that one of its queries sees.
2. One batched matmul gives the chunk's logits; rule by rule they become scores of blocks.
3. A stable sort ranks the blocks of the chunk; the best are written in ascending order.

No buffer exceeds `SCRATCH_ELEMENTS` (one query with all its keys being the smallest unit). Nothing is specific to a CPU: other
devices run it where they have no kernel of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fsa_compile.kernels.cpu import SCRATCH_ELEMENTS, exp_
from fsa_compile.kernels.reference import best_blocks, compute_dtype, query_positions

CHUNK = 256
"""Most queries per chunk: a longer chunk computes more logits that the causal rule hides."""


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int,
    kernel_size: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int,
    q_offsets: Tensor | None,
) -> Tensor:
    """`reference.select_blocks` in bounded memory."""
    dtype = compute_dtype(q, k_cmp)
    (b, hq, n, _), hkv = q.shape, k_cmp.shape[1]
    blocks = -(-n_keys // block_size)
    indices = torch.full((b, hkv, n, top_k), -1, dtype=torch.int32, device=q.device)
    keys = k_cmp[:, :, prefix:].to(dtype)
    key = torch.arange(keys.shape[2], device=q.device)
    first = key * stride
    home = first.div(block_size, rounding_mode="floor")
    # exp(x - inf) = 0: a row without keys has no weight anywhere.
    reference = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)
    for rows, queries, positions, end in _chunks(b, n, hq * max(1, keys.shape[2] + blocks), q_offset, q_offsets, q.device):
        seen = keys.shape[2] if end is None else min(keys.shape[2], max(0, (end - 1 - last) // stride + 1))
        logits = _logits(q[rows, :, queries].to(dtype) * scale, keys[rows, :, :seen])
        weights = exp_(logits.sub_(reference[rows, :, queries].unflatten(1, (hkv, -1))[..., None])).sum(2)
        weights.masked_fill_(key[:seen] * stride + last > positions[:, None, :, None], 0.0)
        scores = weights.new_zeros(*weights.shape[:3], blocks + 1)  # the last one collects what ends behind the last block
        for step in range((kernel_size - 1) // block_size + 2):
            begin = (home[:seen] + step) * block_size
            shared = torch.minimum(first[:seen] + kernel_size, begin + block_size) - torch.maximum(first[:seen], begin)
            share = shared.clamp(min=0).to(dtype) / stride
            scores.index_add_(-1, (home[:seen] + step).clamp(max=blocks), weights * share)
        indices[rows, :, queries] = best_blocks(scores[..., :blocks], positions, block_size, top_k, n_init, n_local)
    return indices


def select_blocks_by_max(
    q: Tensor, k: Tensor, block_size: int, top_k: int, n_init: int, n_local: int, q_offset: int, q_offsets: Tensor | None
) -> Tensor:
    """`reference.select_blocks_by_max` in bounded memory."""
    dtype = compute_dtype(q, k)
    (b, hq, n, _), m = q.shape, k.shape[2]
    blocks = -(-m // block_size)
    indices = torch.full((b, hq, n, top_k), -1, dtype=torch.int32, device=q.device)
    key = torch.arange(blocks * block_size, device=q.device)
    keys = torch.nn.functional.pad(k.to(dtype), (0, 0, 0, blocks * block_size - m))
    for rows, queries, positions, end in _chunks(b, n, hq * max(1, m), q_offset, q_offsets, q.device):
        seen = blocks * block_size if end is None else min(blocks, max(0, (end - 1) // block_size + 1)) * block_size
        logits = _logits(q[rows, :, queries].to(dtype), keys[rows, :, :seen]).flatten(1, 2)
        logits.masked_fill_((key[:seen] > positions[:, None, :, None]) | (key[:seen] >= m), -torch.inf)
        scores = logits.unflatten(-1, (seen // block_size, block_size)).amax(-1)
        indices[rows, :, queries] = best_blocks(scores, positions, block_size, top_k, n_init, n_local)
    return indices


def _chunks(
    b: int, n: int, per_query: int, q_offset: int, q_offsets: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor, int | None]]:
    """Batch rows, queries, their positions (rows or 1, queries), and one past the last position where the host knows it.

    `per_query` numbers per query fit the scratch.
    """
    positions = query_positions(n, q_offset, q_offsets, device)
    length = max(1, min(n, CHUNK, SCRATCH_ELEMENTS // per_query))
    rows = max(1, min(b, SCRATCH_ELEMENTS // (per_query * length)))
    for first in range(0, b, rows):
        own = positions[first : first + rows] if q_offsets is not None else positions
        for i in range(0, n, length):
            end = min(n, i + length) + q_offset if q_offsets is None else None
            yield slice(first, first + rows), slice(i, i + length), own[:, i : i + length], end


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """(b, hkv, group, queries, keys)."""
    return q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)[:, :, None]
