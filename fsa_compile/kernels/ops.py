"""The custom ops: schemas, fake functions, autograd and devices. Importing this module registers them.

| op | returns |
|---|---|
| ``fsa::selected_attention(q, k, v, indices, block_size, scale, rule="causal", q_offset=None, q_offsets=None)`` | out, lse |
| ``fsa::compressed_attention(q, k_cmp, v_cmp, scale, stride, last, prefix=0, q_offset=0, q_offsets=None)`` | out, lse |
| ``fsa::sliding_window_attention(q, k, v, window, scale, q_offset=None, q_offsets=None)`` | out, lse |

Each has a backward op of its own, ``fsa::..._backward(dout, dlse, q, k, v, out, lse, <the other arguments>)`` -> dq, dk, dv, so
that AOTAutograd sees two opaque nodes. The ops that choose blocks are in `select_ops`. Tensors are (b, h, n, d) in any strides and
every result is contiguous. `reference` says what the ops mean; `fsa_compile.ops` holds the checked callables for people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fsa_compile.kernels import cpu, cpu_selected, reference
from fsa_compile.kernels.calls import default_offset, full_precision
from fsa_compile.kernels.select_ops import select_blocks, select_blocks_by_max

__all__ = [
    "compressed_attention",
    "compressed_attention_backward",
    "select_blocks",
    "select_blocks_by_max",
    "selected_attention",
    "selected_attention_backward",
    "sliding_window_attention",
    "sliding_window_attention_backward",
]


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    b, hq, n, _ = q.shape
    return q.new_empty(b, hq, n, v.shape[-1]), q.new_empty(b, hq, n, dtype=reference.compute_dtype(q, k, v))


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _connect(op: Any, backward_op: Any, tensors: int) -> None:
    """Makes `backward_op` the gradient of `op`, whose first `tensors` inputs are tensors and whose last is `q_offsets`."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # An unused out or lse must arrive as None: a zero-filled lse gradient would cost a pass and hide the common case.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], inputs[-1], *output)
        ctx.constants = inputs[tensors:-1]

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *operands, q_offsets, out, lse = ctx.saved_tensors
        q, k, v = operands[:3]
        nothing = (None,) * (tensors - 3 + len(ctx.constants) + 1)
        if dout is None and dlse is None:
            return None, None, None, *nothing
        dout = torch.zeros_like(out) if dout is None else dout
        return *backward_op(dout, dlse, q, k, v, out, lse, *operands[3:], *ctx.constants, q_offsets), *nothing

    op.register_autograd(backward, setup_context=setup_context)
    op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)


# ---------------------------------------------------------------------------------------------------- selected attention


@custom_op(
    "fsa::selected_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor indices, SymInt block_size, float scale, str rule='causal', "
    "SymInt? q_offset=None, Tensor? q_offsets=None) -> (Tensor, Tensor)",
)
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
    """Attention over listed blocks of keys: `reference.selected_attention`."""
    with full_precision(q):
        return cpu_selected.selected_attention_forward(
            q, k, v, indices, block_size, scale, rule, default_offset(q_offset, q, k), q_offsets
        )


@custom_op(
    "fsa::selected_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor indices, "
    "SymInt block_size, float scale, str rule='causal', SymInt? q_offset=None, Tensor? q_offsets=None) "
    "-> (Tensor, Tensor, Tensor)",
)
def selected_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    rule: str = "causal",
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `selected_attention` for q, k and v."""
    with full_precision(q):
        return cpu_selected.selected_attention_backward(
            dout, dlse, q, k, v, out, lse, indices, block_size, scale, rule, default_offset(q_offset, q, k), q_offsets
        )


def _cuda_kernel(name: str, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int) -> Callable[..., Any]:
    """The Triton kernel `name` where triton is installed and takes these arguments, else the blocked path."""
    try:
        from fsa_compile.kernels.triton import selected_attention as kernels
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return getattr(cpu_selected, name)
    return getattr(kernels if kernels.supports(q, k, v, indices, block_size) is None else cpu_selected, name)


@selected_attention.register_kernel("cuda")
def _(
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
    kernel = _cuda_kernel("selected_attention_forward", q, k, v, indices, block_size)
    with full_precision(q):
        return kernel(q, k, v, indices, block_size, scale, rule, default_offset(q_offset, q, k), q_offsets)


@selected_attention_backward.register_kernel("cuda")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    rule: str = "causal",
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _cuda_kernel("selected_attention_backward", q, k, v, indices, block_size)
    with full_precision(q):
        return kernel(
            dout, dlse, q, k, v, out, lse, indices, block_size, scale, rule, default_offset(q_offset, q, k), q_offsets
        )


_connect(selected_attention, selected_attention_backward, tensors=4)


# -------------------------------------------------------------------------------------------------------- bands on a GPU


def _cuda_banded(
    name: str,
    tensors: tuple[Tensor | None, ...],
    qkv: tuple[Tensor, ...],
    scale: float,
    band: Callable[[], cpu.Band],
    **rule: Any,
) -> tuple[Tensor, ...]:
    """The Triton kernel `name` under `rule` where triton is installed and takes `qkv`, else the blocked path over `band`."""
    with full_precision(qkv[0]):
        try:
            from fsa_compile.kernels.triton import banded_attention as kernels
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "triton":
                raise
        else:
            if kernels.supports(*qkv) is None:
                return getattr(kernels, name)(*tensors, scale, kernels.BandRule(**rule))
        return getattr(cpu, name)(*tensors, band(), scale)


# -------------------------------------------------------------------------------------------------- compressed attention


@custom_op(
    "fsa::compressed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k_cmp, Tensor v_cmp, float scale, SymInt stride, SymInt last, SymInt prefix=0, "
    "SymInt q_offset=0, Tensor? q_offsets=None) -> (Tensor, Tensor)",
)
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
    """Attention over compressed keys that ended by the query's position: `reference.compressed_attention`."""
    band = cpu.compressed_band(q.shape[2], k_cmp.shape[2], stride, last, prefix, q_offset, q_offsets)
    with full_precision(q):
        return cpu.banded_attention_forward(q, k_cmp, v_cmp, band, scale)


@custom_op(
    "fsa::compressed_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor out, Tensor lse, float scale, "
    "SymInt stride, SymInt last, SymInt prefix=0, SymInt q_offset=0, Tensor? q_offsets=None) -> (Tensor, Tensor, Tensor)",
)
def compressed_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int = 0,
    q_offset: int = 0,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `compressed_attention` for q, k_cmp and v_cmp."""
    band = cpu.compressed_band(q.shape[2], k_cmp.shape[2], stride, last, prefix, q_offset, q_offsets)
    with full_precision(q):
        return cpu.banded_attention_backward(dout, dlse, q, k_cmp, v_cmp, out, lse, band, scale)


@compressed_attention.register_kernel("cuda")
def _(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int = 0,
    q_offset: int = 0,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    tensors = q, k_cmp, v_cmp
    return _cuda_banded(
        "banded_attention_forward", tensors, tensors, scale,
        lambda: cpu.compressed_band(q.shape[2], k_cmp.shape[2], stride, last, prefix, q_offset, q_offsets),
        stride=stride, last=last, prefix=prefix, q_offset=q_offset, q_offsets=q_offsets,
    )  # fmt: skip


@compressed_attention_backward.register_kernel("cuda")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int = 0,
    q_offset: int = 0,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _cuda_banded(
        "banded_attention_backward", (dout, dlse, q, k_cmp, v_cmp, out, lse), (q, k_cmp, v_cmp), scale,
        lambda: cpu.compressed_band(q.shape[2], k_cmp.shape[2], stride, last, prefix, q_offset, q_offsets),
        stride=stride, last=last, prefix=prefix, q_offset=q_offset, q_offsets=q_offsets,
    )  # fmt: skip


_connect(compressed_attention, compressed_attention_backward, tensors=3)


# ---------------------------------------------------------------------------------------------- sliding-window attention


@custom_op(
    "fsa::sliding_window_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt window, float scale, SymInt? q_offset=None, Tensor? q_offsets=None) "
    "-> (Tensor, Tensor)",
)
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last `window` keys: `reference.sliding_window_attention`."""
    band = cpu.sliding_window_band(q.shape[2], k.shape[2], window, default_offset(q_offset, q, k), q_offsets)
    with full_precision(q):
        return cpu.banded_attention_forward(q, k, v, band, scale)


@custom_op(
    "fsa::sliding_window_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt window, float scale, "
    "SymInt? q_offset=None, Tensor? q_offsets=None) -> (Tensor, Tensor, Tensor)",
)
def sliding_window_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sliding_window_attention` for q, k and v."""
    band = cpu.sliding_window_band(q.shape[2], k.shape[2], window, default_offset(q_offset, q, k), q_offsets)
    with full_precision(q):
        return cpu.banded_attention_backward(dout, dlse, q, k, v, out, lse, band, scale)


@sliding_window_attention.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    offset = default_offset(q_offset, q, k)
    return _cuda_banded(
        "banded_attention_forward", (q, k, v), (q, k, v), scale,
        lambda: cpu.sliding_window_band(q.shape[2], k.shape[2], window, offset, q_offsets),
        window=window, q_offset=offset, q_offsets=q_offsets,
    )  # fmt: skip


@sliding_window_attention_backward.register_kernel("cuda")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
    q_offset: int | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    offset = default_offset(q_offset, q, k)
    return _cuda_banded(
        "banded_attention_backward", (dout, dlse, q, k, v, out, lse), (q, k, v), scale,
        lambda: cpu.sliding_window_band(q.shape[2], k.shape[2], window, offset, q_offsets),
        window=window, q_offset=offset, q_offsets=q_offsets,
    )  # fmt: skip


_connect(sliding_window_attention, sliding_window_attention_backward, tensors=3)
