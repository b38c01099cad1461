"""Banded attention on a GPU, the kernel of sliding windows and of compressed keys: the entry points.

Query i sees an interval of keys whose ends grow with i (`bands.BandRule`). Shapes: b batch, hq query heads, hkv key/value
heads, hkv | hq, n queries, m keys, dk and dv head dimensions. Nothing here waits for the device: the calls can be captured
in a CUDA graph. There are no atomics: two runs agree bit for bit.
"""

from __future__ import annotations

import torch

from . import banded_launch
from .alignment import align, narrow
from .banded_backward import backward
from .banded_forward import forward
from .bands import BandRule
from .launch import current_device, device_of, power_of_two
from .selected_attention import DTYPES, MOST_HEAD_DIM

__all__ = ["BandRule", "banded_attention_backward", "banded_attention_forward", "supports"]

LEAST_HEAD_DIM = 16


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why these kernels do not take the inputs: one sentence, or None if they do. Reads shapes, dtypes and devices only."""
    if not all(x.dim() == 4 for x in (q, k, v)):
        return "q, k and v must be four-dimensional (b, h, n, d)."
    (b, hq, _, dk), (hkv, m, dv) = q.shape, v.shape[1:]
    if k.shape != (b, hkv, m, dk) or v.shape[0] != b:
        return "the shapes of q, k and v do not belong together."
    if hq and (hkv == 0 or hq % hkv):
        return f"{hkv} key/value heads must divide {hq} query heads."
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v must share one dtype of float16, bfloat16 and float32, not {q.dtype}, {k.dtype}, {v.dtype}."
    if max(dk, dv) > MOST_HEAD_DIM or min(dk, dv) < LEAST_HEAD_DIM:
        return f"head dimensions {dk} and {dv} must be between {LEAST_HEAD_DIM} and {MOST_HEAD_DIM}."
    if len({x.device for x in (q, k, v)}) != 1:
        return "q, k and v must be on one device."
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0."
    device, d, e = device_of(q), power_of_two(dk, 16), power_of_two(dv, 16)
    for launch, memory in (
        (banded_launch.forward_launch(1, dk, dv, q.dtype, device), banded_launch.forward_shared_memory),
        (banded_launch.dq_launch(1, dk, dv, q.dtype, device), banded_launch.dq_shared_memory),
        (banded_launch.dkv_launch(1, dk, dv, q.dtype, device, 1 << 20), banded_launch.dkv_shared_memory),
    ):
        needed = memory(launch.rows, launch.keys, d, e, q.element_size(), launch.stages)
        if needed > device.shared_memory:
            return f"a tile needs {needed} bytes of shared memory, the device has {device.shared_memory}."
    return None


def banded_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: BandRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query over its band of keys.

    Args:
        q: (b, hq, n, dk) float16, bfloat16 or float32.
        k: (b, hkv, m, dk), same dtype.
        v: (b, hkv, m, dv), same dtype.
        scale: Factor of the logits.
        rule: Which keys a query sees.

    Returns:
        out (b, hq, n, dv), contiguous, of q's dtype, and lse (b, hq, n) float32, natural logarithm. A query that sees no
        key gets 0 and -inf.

    Raises:
        ValueError: for inputs that `supports` refuses, or a stride below 1.
    """
    _check(q, k, v, rule)
    with current_device(q):
        out, lse = forward(*map(align, (q, k, v)), scale, rule)
    return narrow(out, v.shape[-1]), lse


def banded_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    rule: BandRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `banded_attention_forward`.

    Args:
        dout: (b, hq, n, dv) gradient of out.
        dlse: (b, hq, n) gradient of lse, or None.
        q, k, v, scale, rule: As in forward.
        out: (b, hq, n, dv) from forward.
        lse: (b, hq, n) float32 from forward.

    Returns:
        dq (b, hq, n, dk), dk (b, hkv, m, dk), dv (b, hkv, m, dv), contiguous, of the inputs' dtype.

    Raises:
        ValueError: for inputs that `supports` refuses, or a stride below 1.
    """
    _check(q, k, v, rule)
    aligned = [align(x) for x in (q, k, v, out)]
    with current_device(q):
        dq, dk, dv = backward(align(dout.to(q.dtype)), dlse, *aligned, lse.contiguous(), scale, rule)
    return narrow(dq, q.shape[-1]), narrow(dk, k.shape[-1]), narrow(dv, v.shape[-1])


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: BandRule) -> None:
    if rule.stride < 1:
        raise ValueError(f"stride must be at least 1, not {rule.stride}.")
    if (why := supports(q, k, v)) is not None:
        raise ValueError(f"banded attention: {why}")
