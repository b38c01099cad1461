"""The custom ops that choose blocks of tokens: schemas, fake functions and devices. Importing this module registers them.

| op | returns |
|---|---|
| ``fsa::select_blocks`` | indices (b, hkv, n, top_k) int32, by the probabilities of compressed attention |
| ``fsa::select_blocks_by_max`` | indices (b, hq, n, top_k) int32, by the largest logit of a block |

Lists are ascending with -1 behind; nothing is differentiable. `reference` says what the ops mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fsa_compile.kernels import cpu_select
from fsa_compile.kernels.calls import default_offset, full_precision


def _cuda_selection(name: str, *arguments: Any) -> Tensor:
    """The Triton kernel `name` where triton is installed and takes the arguments, else the blocked path."""
    with full_precision(arguments[0]):
        try:
            from fsa_compile.kernels.triton import block_selection as kernels
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "triton":
                raise
        else:
            if getattr(kernels, f"{name}_supports")(*arguments) is None:
                return getattr(kernels, name)(*arguments)
        return getattr(cpu_select, name)(*arguments)


@custom_op(
    "fsa::select_blocks",
    mutates_args=(),
    schema="(Tensor q, Tensor k_cmp, Tensor lse, float scale, SymInt stride, SymInt last, SymInt prefix, SymInt kernel_size, "
    "SymInt block_size, SymInt n_keys, SymInt top_k, SymInt n_init, SymInt n_local, SymInt q_offset=0, Tensor? q_offsets=None) "
    "-> Tensor",
)
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
    """Blocks by compressed probability, (b, hkv, n, top_k) int32: `reference.select_blocks`. Not differentiable."""
    with full_precision(q):
        return cpu_select.select_blocks(
            q, k_cmp, lse, scale, stride, last, prefix, kernel_size, block_size, n_keys, top_k, n_init, n_local,
            q_offset, q_offsets,
        )  # fmt: skip


@select_blocks.register_fake
def _(
    q: Tensor, k_cmp: Tensor, lse: Tensor, scale: float, stride: int, last: int, prefix: int, kernel_size: int,
    block_size: int, n_keys: int, top_k: int, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], top_k, dtype=torch.int32)


@select_blocks.register_kernel("cuda")
def _(
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
    return _cuda_selection(
        "select_blocks", q, k_cmp, lse, scale, stride, last, prefix, kernel_size, block_size, n_keys, top_k, n_init, n_local,
        q_offset, q_offsets,
    )  # fmt: skip


@custom_op(
    "fsa::select_blocks_by_max",
    mutates_args=(),
    schema="(Tensor q, Tensor k, SymInt block_size, SymInt top_k, SymInt n_init, SymInt n_local, SymInt? q_offset=None, "
    "Tensor? q_offsets=None) -> Tensor",
)
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
    """Blocks by largest logit, (b, hq, n, top_k) int32: `reference.select_blocks_by_max`. Not differentiable."""
    with full_precision(q):
        return cpu_select.select_blocks_by_max(
            q, k, block_size, top_k, n_init, n_local, default_offset(q_offset, q, k), q_offsets
        )


@select_blocks_by_max.register_fake
def _(q: Tensor, k: Tensor, block_size: int, top_k: int, *args: Any, **kwargs: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], top_k, dtype=torch.int32)


@select_blocks_by_max.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    block_size: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> Tensor:
    offset = default_offset(q_offset, q, k)
    return _cuda_selection("select_blocks_by_max", q, k, block_size, top_k, n_init, n_local, offset, q_offsets)
