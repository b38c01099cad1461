"""What the ops compute, spelled out: dense, eager, differentiable PyTorch. The oracle of every test.

Each op is `masked_attention` under its own visibility, an explicit boolean mask (b or 1, h or 1, n, m). Memory grows with
n * m: use it for checking, not for training.
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("causal", "listed", "diagonal")
"""How `selected_visibility` treats keys of a listed block: see there."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: the dtype of logits, statistics and accumulators."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def query_positions(n: int, q_offset: int, q_offsets: Tensor | None, device: torch.device) -> Tensor:
    """Where the queries stand among the keys, (1, n), or (b, n) when every batch row has its own offset.

    Args:
        n: Number of queries.
        q_offset: Position of query 0; ignored if `q_offsets` is given.
        q_offsets: Position of query 0 per batch row, integer (b,), or None.
        device: Where the result lives.
    """
    steps = torch.arange(n, device=device)
    if q_offsets is None:
        return (steps + q_offset)[None]
    return q_offsets.to(device=device, dtype=torch.int64)[:, None] + steps


def selected_visibility(indices: Tensor, positions: Tensor, block_size: int, m: int, rule: str = "causal") -> Tensor:
    """Which keys a query sees when it lists blocks of keys, (b, hi, n, m).

    Key p is visible iff its block ``p // block_size`` is listed and

    * "causal": ``p <= position``;
    * "listed": always;
    * "diagonal": ``p <= position`` or p is in another block than the query.

    A list is a set: order, duplicates, negative entries and entries past the last block do not matter.

    Args:
        indices: Block numbers, (b, hi, n, t).
        positions: From `query_positions`, (b or 1, n).
        block_size: Keys per block.
        m: Number of keys.
        rule: One of `RULES`.
    """
    b, hi, n, _ = indices.shape
    n_blocks = -(-m // block_size)
    valid = (indices >= 0) & (indices < n_blocks)
    listed = torch.zeros(b, hi, n, n_blocks + 1, dtype=torch.bool, device=indices.device)
    listed.scatter_(-1, torch.where(valid, indices, n_blocks).long(), True)
    keys = torch.arange(m, device=indices.device)
    seen = listed[..., keys // block_size]
    position = positions[:, None, :, None]
    if rule == "causal":
        return seen & (keys <= position)
    if rule == "diagonal":
        own = keys // block_size == position.div(block_size, rounding_mode="floor")
        return seen & (~own | (keys <= position))
    return seen


def compressed_visibility(positions: Tensor, c: int, stride: int, last: int, prefix: int = 0) -> Tensor:
    """Which compressed keys a query sees, (b or 1, 1, n, c).

    Key j is visible iff ``j < prefix or (j - prefix) * stride + last <= position``.

    Args:
        positions: From `query_positions`, (b or 1, n).
        c: Number of compressed keys.
        stride: Tokens between the starts of neighbouring compressed keys.
        last: Offset of the last token that a compressed key summarises (kernel size - 1).
        prefix: Compressed keys in front that everybody sees (learned memory tokens).
    """
    keys = torch.arange(c, device=positions.device)
    return (keys < prefix) | ((keys - prefix) * stride + last <= positions[:, None, :, None])


def sliding_window_visibility(positions: Tensor, m: int, window: int) -> Tensor:
    """Which keys a query sees through a window, (b or 1, 1, n, m): key p iff ``position - window < p <= position``.

    Args:
        positions: From `query_positions`, (b or 1, n).
        m: Number of keys.
        window: Number of keys seen, the query's own included.
    """
    keys = torch.arange(m, device=positions.device)
    position = positions[:, None, :, None]
    return (position - window < keys) & (keys <= position)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys; a row that sees none gives out 0, lse -inf and zero gradients.

    Args:
        q: Queries (b, hq, n, dk).
        k: Keys (b, hkv, m, dk), hkv dividing hq; query head h reads key head ``h // (hq / hkv)``.
        v: Values (b, hkv, m, dv).
        visible: Boolean (b or 1, 1 or a divisor of hq, n, m).
        scale: Multiplies the logits.

    Returns:
        out (b, hq, n, dv) in q's dtype and the natural log-sum-exp of the logits, (b, hq, n), float32 (float64 for float64).
    """
    compute = compute_dtype(q)
    hq = q.shape[1]
    k, v = (x.to(compute).repeat_interleave(hq // x.shape[1], dim=1) for x in (k, v))
    visible = visible.repeat_interleave(hq // visible.shape[1], dim=1)
    logits = (q.to(compute) @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    if logits.shape[-1] == 0:
        return (logits @ v).to(q.dtype), logits.sum(-1) - torch.inf
    some = visible.any(-1, keepdim=True).expand(*q.shape[:-1], 1)
    peak = logits.detach().amax(-1, keepdim=True).masked_fill(~some, 0.0)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True).masked_fill(~some, 1.0)
    lse = (peak + total.log()).masked_fill(~some, -torch.inf)
    return (weights / total @ v).to(q.dtype), lse.squeeze(-1)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    rule: str = "causal",
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_attention` under `selected_visibility`; the default offset is m - n."""
    n, m = q.shape[2], k.shape[2]
    positions = query_positions(n, m - n if q_offset is None else q_offset, q_offsets, q.device)
    return masked_attention(q, k, v, selected_visibility(indices, positions, block_size, m, rule), scale)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int = 0,
    q_offset: int = 0,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_attention` under `compressed_visibility`."""
    positions = query_positions(q.shape[2], q_offset, q_offsets, q.device)
    return masked_attention(q, k_cmp, v_cmp, compressed_visibility(positions, k_cmp.shape[2], stride, last, prefix), scale)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_attention` under `sliding_window_visibility`; the default offset is m - n."""
    n, m = q.shape[2], k.shape[2]
    positions = query_positions(n, m - n if q_offset is None else q_offset, q_offsets, q.device)
    return masked_attention(q, k, v, sliding_window_visibility(positions, m, window), scale)


def block_overlap(c: int, blocks: int, stride: int, kernel_size: int, block_size: int, device: torch.device) -> Tensor:
    """How often each compressed key counts for each block of tokens, (c, blocks) float64.

    Key j summarises the tokens ``j * stride ... j * stride + kernel_size - 1``; it counts for a block as many times as strides
    fit into the tokens that they share. Equation 9 of arXiv 2502.11089 is this with block_size and kernel_size multiples of stride
    (read with 0-based indices it is three keys off; the overlap is what it means).
    """
    first = torch.arange(c, device=device)[:, None] * stride
    begin = torch.arange(blocks, device=device) * block_size
    shared = torch.minimum(first + kernel_size, begin + block_size) - torch.maximum(first, begin)
    return shared.clamp(min=0).double() / stride


def best_blocks(scores: Tensor, positions: Tensor, block_size: int, top_k: int, n_init: int, n_local: int) -> Tensor:
    """The blocks that each query attends to: forced ones and the best of the others, (b, h, n, top_k) int32, ascending, -1 last.

    Block j can be chosen iff ``j * block_size <= position``. The first `n_init` and the last `n_local` of these are forced, the
    query's own block being the last; they count in `top_k`. Of equal scores the lower block wins.

    Args:
        scores: (b, h, n, blocks), any floating dtype; those of forced blocks do not matter.
        positions: From `query_positions`, (b or 1, n).
        block_size: Tokens per block.
        top_k: Blocks to choose, at least n_init + n_local.
        n_init, n_local: Forced blocks at the beginning and at the query.
    """
    blocks = scores.shape[-1]
    block = torch.arange(blocks, device=scores.device)
    own = positions.div(block_size, rounding_mode="floor")[:, None, :, None]
    forced = (block < n_init) | (block > own - n_local)
    finite = torch.finfo(scores.dtype)
    ranked = scores.clamp(finite.min, finite.max).masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    ranked, chosen = ranked.sort(dim=-1, descending=True, stable=True)
    chosen = chosen.masked_fill(ranked == -torch.inf, blocks)[..., :top_k].sort(-1).values
    chosen = chosen.masked_fill(chosen == blocks, -1)
    return torch.nn.functional.pad(chosen, (0, top_k - chosen.shape[-1]), value=-1).to(torch.int32)


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
    q_offset: int = 0,
    q_offsets: Tensor | None = None,
) -> Tensor:
    """`best_blocks` by the compressed probabilities of a group's query heads, counted by `block_overlap`; the prefix counts nothing.

    The probabilities are ``exp(logit - lse)``, with the lse that `compressed_attention` returns.
    """
    compute = compute_dtype(q)
    (b, hq, n, _), (hkv, c) = q.shape, k_cmp.shape[1:3]
    positions = query_positions(n, q_offset, q_offsets, q.device)
    visible = compressed_visibility(positions, c, stride, last, prefix)
    keys = k_cmp.to(compute).repeat_interleave(hq // hkv, dim=1)
    logits = (q.to(compute) @ keys.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    lse = lse.to(compute).masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(logits - lse[..., None]).unflatten(1, (hkv, -1)).sum(2)
    overlap = block_overlap(max(c - prefix, 0), -(-n_keys // block_size), stride, kernel_size, block_size, q.device)
    return best_blocks(weights[..., prefix:] @ overlap.to(compute), positions, block_size, top_k, n_init, n_local)


def select_blocks_by_max(
    q: Tensor,
    k: Tensor,
    block_size: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> Tensor:
    """`best_blocks` by the largest logit of a block's visible keys, for each query head: MiniMax-M3's indexer.

    The default offset is m - n.
    """
    compute = compute_dtype(q)
    (b, hq, n, _), (hkv, m) = q.shape, k.shape[1:3]
    positions = query_positions(n, m - n if q_offset is None else q_offset, q_offsets, q.device)
    logits = q.to(compute) @ k.to(compute).repeat_interleave(hq // hkv, dim=1).transpose(-1, -2)
    logits = logits.masked_fill(torch.arange(m, device=q.device) > positions[:, None, :, None], -torch.inf)
    short = -m % block_size
    scores = torch.nn.functional.pad(logits, (0, short), value=-torch.inf).unflatten(-1, (-1, block_size)).amax(-1)
    return best_blocks(scores, positions, block_size, top_k, n_init, n_local)
