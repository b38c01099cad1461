"""The attention ops as callables for hand-written models: checked arguments, differentiable, fit for `torch.compile`.

All three are softmax attention of queries ``(b, hq, n, dk)`` over keys ``(b, hkv, m, dk)`` and values ``(b, hkv, m, dv)``; hkv
divides hq and query head h reads key head ``h // (hq // hkv)``. They differ in which keys a query sees. A query that sees no key
gets 0, a log-sum-exp of -inf and no gradient. Statistics and sums are float32 (float64 for float64 input) whatever the input;
no n x m buffer is made. Any strides are accepted: transposed views need no copy.

Query i stands at position ``i + q_offset`` among the keys. Give an int, or an integer tensor (b,) with one offset per batch row.

Example:
    >>> import torch
    >>> from fsa_compile.ops import selected_attention, sliding_window_attention
    >>> q = torch.randn(1, 4, 256, 32, requires_grad=True)
    >>> k, v = torch.randn(1, 2, 256, 32), torch.randn(1, 2, 256, 32)
    >>> own = (torch.arange(256) // 64).expand(1, 2, 256)
    >>> blocks = torch.stack([own, torch.zeros_like(own)], dim=-1)  # each query's own block, and the first
    >>> out, lse = selected_attention(q, k, v, blocks, block_size=64, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 256, 32]), torch.Size([1, 4, 256]))
    >>> (out + sliding_window_attention(q, k, v, window=32)).sum().backward()
    >>> q.grad.shape
    torch.Size([1, 4, 256, 32])
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsa_compile.kernels import ops
from fsa_compile.kernels.reference import RULES

__all__ = [
    "compressed_attention",
    "select_blocks",
    "select_blocks_by_max",
    "selected_attention",
    "sliding_window_attention",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    rule: str = "causal",
    q_offset: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the blocks of keys that it lists (Native Sparse Attention, arXiv 2502.11089, section 3.3.2).

    Key p is visible iff block ``p // block_size`` is listed and, by `rule`, "causal": ``p <= position``; "listed": always;
    "diagonal": ``p <= position`` or the block is not the query's own.

    Args:
        q: Queries (b, hq, n, dk), float16, bfloat16, float32 or float64.
        k: Keys (b, hkv, m, dk), q's dtype and device.
        v: Values (b, hkv, m, dv), q's dtype and device.
        indices: Block numbers (b, hi, n, t), int32 or int64, for each key head (hi = hkv), each query head (hi = hq), or
            anything between that hkv divides and that divides hq. A list is a set: order and duplicates do not matter,
            negative numbers and numbers past the last block are no block.
        block_size: Keys per block, at least 1; the last block may be short.
        scale: Multiplies the logits; dk ** -0.5 by default.
        rule: "causal", "listed" or "diagonal".
        q_offset: Position of query 0, int or (b,); m - n by default.
        return_lse: Also return the log-sum-exp, which is differentiable too.

    Returns:
        out (b, hq, n, dv) in q's dtype; with `return_lse` also lse, the natural logarithm of the sum of exp(logit) over the
        visible keys, (b, hq, n), float32 (float64 for float64 input).

    Raises:
        TypeError: A dtype that is none of those named above.
        ValueError: Any other argument that is not as described.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
        >>> everything = torch.arange(4).expand(1, 2, 128, 4)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(selected_attention(q, k, v, everything, block_size=32), dense, atol=1e-5)
        True
    """
    _check_operands("k", "v", q, k, v)
    _check_size("block_size", block_size, 1)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}.")
    if indices.dtype not in _INDEX_DTYPES:
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}.")
    if indices.dim() != 4 or indices.shape[0] != q.shape[0] or indices.shape[2] != q.shape[2] or indices.device != q.device:
        raise ValueError(
            f"indices must be (b, hi, n, t) with b = {q.shape[0]} and n = {q.shape[2]} on {q.device}, "
            f"got {tuple(indices.shape)} on {indices.device}."
        )
    hq, hkv, hi = q.shape[1], k.shape[1], indices.shape[1]
    if hi == 0 or hi % hkv != 0 or hq % hi != 0:
        raise ValueError(f"indices must have a number of heads that {hkv} divides and that divides {hq}, got {hi}.")
    offset, offsets = _split_offset(q_offset, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = ops.selected_attention(q, k, v, indices, block_size, scale, rule, offset, offsets)
    return result if return_lse else result[0]


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    stride: int,
    last: int,
    prefix: int = 0,
    scale: float | None = None,
    q_offset: int | Tensor = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the compressed keys that ended by its position (arXiv 2502.11089, section 3.3.1).

    Compressed key j is visible iff ``j < prefix`` or ``(j - prefix) * stride + last <= position``.

    Args:
        q: Queries (b, hq, n, dk), float16, bfloat16, float32 or float64.
        k_cmp: Compressed keys (b, hkv, c, dk), q's dtype and device.
        v_cmp: Compressed values (b, hkv, c, dv), q's dtype and device.
        stride: Tokens between the starts of neighbouring compressed keys, at least 1.
        last: Offset of the last token that a compressed key summarises: kernel size - 1.
        prefix: Number of compressed keys in front that every query sees (learned memory tokens).
        scale: Multiplies the logits; dk ** -0.5 by default.
        q_offset: Position of query 0, int or (b,). There is no default from sizes: c does not tell the number of tokens.
        return_lse: Also return the log-sum-exp, which is differentiable too.

    Returns:
        out (b, hq, n, dv) in q's dtype; with `return_lse` also lse, natural logarithm, (b, hq, n), float32 (float64 for float64
        input).

    Raises:
        TypeError: A dtype that is none of those named above.
        ValueError: Any other argument that is not as described.

    Example:
        >>> q = torch.randn(1, 4, 64, 16)
        >>> k, v = (torch.randn(1, 2, 64, 16).unflatten(2, (-1, 8)).mean(3) for _ in range(2))
        >>> out, lse = compressed_attention(q, k, v, stride=8, last=7, return_lse=True)
        >>> bool(lse[..., :7].isneginf().all()), bool(lse[..., 7:].isfinite().all())  # the first 7 queries see nothing
        (True, True)
    """
    _check_operands("k_cmp", "v_cmp", q, k_cmp, v_cmp)
    _check_size("stride", stride, 1)
    _check_size("prefix", prefix, 0)
    if q_offset is None:
        raise ValueError("q_offset must be an int or a (b,) tensor: compressed keys do not tell where the queries stand.")
    offset, offsets = _split_offset(q_offset, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = ops.compressed_attention(q, k_cmp, v_cmp, scale, stride, last, prefix, 0 if offset is None else offset, offsets)
    return result if return_lse else result[0]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over the last `window` keys up to its position, its own included.

    Key p is visible iff ``position - window < p <= position``.

    Args:
        q: Queries (b, hq, n, dk), float16, bfloat16, float32 or float64.
        k: Keys (b, hkv, m, dk), q's dtype and device.
        v: Values (b, hkv, m, dv), q's dtype and device.
        window: Number of keys, at least 1.
        scale: Multiplies the logits; dk ** -0.5 by default.
        q_offset: Position of query 0, int or (b,); m - n by default.
        return_lse: Also return the log-sum-exp, which is differentiable too.

    Returns:
        out (b, hq, n, dv) in q's dtype; with `return_lse` also lse, natural logarithm, (b, hq, n), float32 (float64 for float64
        input).

    Raises:
        TypeError: A dtype that is none of those named above.
        ValueError: Any other argument that is not as described.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
        >>> torch.allclose(sliding_window_attention(q, k, v, window=1), v, atol=1e-6)
        True
    """
    _check_operands("k", "v", q, k, v)
    _check_size("window", window, 1)
    offset, offsets = _split_offset(q_offset, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = ops.sliding_window_attention(q, k, v, window, scale, offset, offsets)
    return result if return_lse else result[0]


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    stride: int,
    kernel_size: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int = 1,
    n_local: int = 2,
    last: int | None = None,
    prefix: int = 0,
    scale: float | None = None,
    q_offset: int | Tensor = 0,
) -> Tensor:
    """The blocks of tokens that matter most to each query by its compressed attention (arXiv 2502.11089, section 3.3.2).

    The score of a block is the sum, over the query heads that share a key head and over the compressed keys, of the key's
    probability times the number of strides of tokens that key and block share. Forced blocks count in `top_k`: the first
    `n_init` and the last `n_local` up to the query's own. Of equal scores the lower block wins. Not differentiable.

    Args:
        q: Queries (b, hq, n, dk), float16, bfloat16, float32 or float64.
        k_cmp: Compressed keys (b, hkv, c, dk), q's dtype and device.
        lse: Log-sum-exp that `compressed_attention` returned for them, (b, hq, n), float32 or float64.
        stride: Tokens between the starts of neighbouring compressed keys, at least 1.
        kernel_size: Tokens that a compressed key summarises, at least 1.
        block_size: Tokens per block, at least 1.
        n_keys: Number of tokens; blocks past the last one are never chosen.
        top_k: Blocks to choose, at least n_init + n_local.
        n_init: Blocks at the beginning that every query gets.
        n_local: Blocks at the query that it always gets, its own included.
        last: As in `compressed_attention`; kernel_size - 1 by default.
        prefix: As in `compressed_attention`; these keys count for no block.
        scale: Multiplies the logits; dk ** -0.5 by default.
        q_offset: Position of query 0, int or (b,).

    Returns:
        Block numbers (b, hkv, n, top_k), int32, ascending; -1 fills the end of lists of queries with fewer blocks.

    Raises:
        TypeError: A dtype that is none of those named above.
        ValueError: Any other argument that is not as described.

    Example:
        >>> q, tokens = torch.randn(1, 4, 256, 16), torch.randn(1, 2, 256, 16)
        >>> k = v = tokens.unfold(2, 32, 16).mean(-1)
        >>> out, lse = compressed_attention(q, k, v, stride=16, last=31, return_lse=True)
        >>> blocks = select_blocks(q, k, lse, stride=16, kernel_size=32, block_size=32, n_keys=256, top_k=4)
        >>> blocks.shape, blocks[0, 0, 40].tolist()  # block 1 is query 40's own, and it has no others
        (torch.Size([1, 2, 256, 4]), [0, 1, -1, -1])
    """
    _check_operands("k_cmp", "k_cmp", q, k_cmp, k_cmp)
    for name, value in (("stride", stride), ("kernel_size", kernel_size)):
        _check_size(name, value, 1)
    for name, value in (("prefix", prefix), ("n_keys", n_keys)):
        _check_size(name, value, 0)
    _check_choice(block_size, top_k, n_init, n_local)
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32 or float64, got {lse.dtype}.")
    if lse.shape != q.shape[:3] or lse.device != q.device:
        raise ValueError(f"lse must be {tuple(q.shape[:3])} on {q.device}, got {tuple(lse.shape)} on {lse.device}.")
    if q_offset is None:
        raise ValueError("q_offset must be an int or a (b,) tensor: compressed keys do not tell where the queries stand.")
    offset, offsets = _split_offset(q_offset, q)
    return ops.select_blocks(
        q, k_cmp, lse, q.shape[-1] ** -0.5 if scale is None else scale, stride, kernel_size - 1 if last is None else last, prefix,
        kernel_size, block_size, n_keys, top_k, n_init, n_local, 0 if offset is None else offset, offsets,
    )  # fmt: skip


def select_blocks_by_max(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    top_k: int,
    n_init: int = 0,
    n_local: int = 1,
    q_offset: int | Tensor | None = None,
) -> Tensor:
    """The blocks of keys that hold the largest logits of each query head: the indexer of MiniMax-M3.

    The score of a block is the largest ``q . k`` of its keys up to the query's position. Forced blocks and ties are those of
    `select_blocks`; every query head has a list of its own. Not differentiable.

    Args:
        q: Indexer queries (b, hq, n, dk), float16, bfloat16, float32 or float64.
        k: Indexer keys (b, hkv, m, dk), q's dtype and device.
        block_size: Keys per block, at least 1; the last block may be short.
        top_k: Blocks to choose, at least n_init + n_local.
        n_init: Blocks at the beginning that every query gets.
        n_local: Blocks at the query that it always gets, its own included.
        q_offset: Position of query 0, int or (b,); m - n by default.

    Returns:
        Block numbers (b, hq, n, top_k), int32, ascending; -1 fills the end of lists of queries with fewer blocks.

    Raises:
        TypeError: A dtype that is none of those named above.
        ValueError: Any other argument that is not as described.

    Example:
        >>> q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
        >>> select_blocks_by_max(q, k, block_size=8, top_k=3)[0, :, 10].tolist()
        [[0, 1, -1], [0, 1, -1]]
    """
    _check_operands("k", "k", q, k, k)
    _check_choice(block_size, top_k, n_init, n_local)
    offset, offsets = _split_offset(q_offset, q)
    return ops.select_blocks_by_max(q, k, block_size, top_k, n_init, n_local, offset, offsets)


def _check_choice(block_size: int, top_k: int, n_init: int, n_local: int) -> None:
    for name, value, least in (("block_size", block_size, 1), ("n_init", n_init, 0), ("n_local", n_local, 0)):
        _check_size(name, value, least)
    if top_k < max(1, n_init + n_local):
        raise ValueError(f"top_k must be at least 1 and n_init + n_local = {n_init + n_local}, got {top_k}.")


def _check_operands(k_name: str, v_name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}.")
    if q.dim() != 4:
        raise ValueError(f"q must be (b, hq, n, dk), got {tuple(q.shape)}.")
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}.")
        if x.dim() != 4 or x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must be (b, hkv, m, d) with b = {q.shape[0]}, got {tuple(x.shape)}.")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have q's head dimension {q.shape[-1]}, got {k.shape[-1]}.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{k_name} must have a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{v_name} must have {k_name}'s sizes {tuple(k.shape[:3])} but for the last, got {tuple(v.shape[:3])}.")


def _check_size(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _split_offset(q_offset: int | Tensor | None, q: Tensor) -> tuple[int | None, Tensor | None]:
    """The int and the tensor form of a position argument, of which the ops take one each."""
    if not isinstance(q_offset, Tensor):
        return q_offset, None
    if q_offset.dtype not in _INDEX_DTYPES:
        raise TypeError(f"q_offset must be int32 or int64 where it is a tensor, got {q_offset.dtype}.")
    if q_offset.shape != q.shape[:1]:
        raise ValueError(f"q_offset must be an int or a tensor of shape ({q.shape[0]},), got {tuple(q_offset.shape)}.")
    return None, q_offset
