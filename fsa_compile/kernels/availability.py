"""Whether an op has a real kernel for a case, or would run the blocked PyTorch path: what profit decides on.

On the CPU the blocked path is the kernel. On CUDA it is a fallback that keeps results right and is much slower than what
Inductor makes of dense attention, so `profit="auto"` does not rewrite there.
"""

from __future__ import annotations

from typing import Any

import torch


def why_no_kernel(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dims: tuple[int, int], block_size: int | None = None
) -> str | None:
    """One sentence on why no kernel takes the case, or None if one does.

    Args:
        device: Where the op would run.
        dtype: Of q, k and v.
        heads: ``(hq, hkv)``.
        head_dims: ``(dk, dv)``.
        block_size: Keys per block for selected attention; None for the window and compressed ops.
    """
    if device.type != "cuda":
        return None
    try:
        from .triton import banded_attention, selected_attention
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return "triton is not installed"
    (hq, hkv), (dk, dv) = heads, head_dims
    q, k, v = (torch.empty(1, h, 1, d, device=device, dtype=dtype) for h, d in ((hq, dk), (hkv, dk), (hkv, dv)))
    if block_size is None:
        return banded_attention.supports(q, k, v)
    indices = torch.zeros(1, hkv, 1, 1, device=device, dtype=torch.int64)
    return selected_attention.supports(q, k, v, indices, block_size)


def why_no_selection_kernel(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    stride: int,
    kernel_size: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int,
    n_local: int,
) -> str | None:
    """One sentence on why no kernel selects blocks by compressed probability, or None if one does.

    Args:
        device: Where the op would run.
        dtype: Of q and k_cmp.
        heads: ``(hq, hkv)``.
        head_dim: dk.
        stride, kernel_size, block_size, n_keys, top_k, n_init, n_local: As in `reference.select_blocks`.
    """
    kernels = _selection_kernels(device)
    if kernels is None or isinstance(kernels, str):
        return kernels
    q, k = (torch.empty(1, h, 1, head_dim, device=device, dtype=dtype) for h in heads)
    rule = 1.0, stride, kernel_size - 1, 0, kernel_size, block_size, n_keys, top_k, n_init, n_local, 0, None
    return kernels.select_blocks_supports(q, k, q.new_empty(1, heads[0], 1), *rule)


def why_no_maximum_kernel(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int,
    n_local: int,
) -> str | None:
    """The same for `reference.select_blocks_by_max`."""
    kernels = _selection_kernels(device)
    if kernels is None or isinstance(kernels, str):
        return kernels
    q, k = (torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype).expand(1, h, n, -1) for h, n in zip(heads, (1, n_keys)))
    return kernels.select_blocks_by_max_supports(q, k, block_size, top_k, n_init, n_local, 0, None)


def _selection_kernels(device: torch.device) -> Any:
    """The module of the kernels, a sentence on why there is none, or None on a CPU, which needs none."""
    if device.type != "cuda":
        return None
    try:
        from .triton import block_selection
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return "triton is not installed"
    return block_selection
