"""Selected attention on a GPU: the entry points of `plan`, `selected_forward` and `selected_backward`.

Shapes: b batch, hq query heads, hkv key/value heads, hi index heads with hkv | hi | hq, n queries, m keys, t slots per list,
dk and dv head dimensions. Query heads ``x * hq/hi ... (x + 1) * hq/hi - 1`` share index list x and key/value head
``x * hkv // hi``.

Nothing here waits for the device: the calls can be captured in a CUDA graph. Scratch memory is bounded by the constants of
`launch`, whatever the indices hold.
"""

from __future__ import annotations

import torch

from .alignment import align, narrow
from .launch import (
    backward_launch, backward_shared_memory, current_device, device_of, forward_launch, forward_shared_memory, power_of_two,
)  # fmt: skip
from .plan import Positions
from .selected_backward import backward
from .selected_forward import forward

RULES = ("causal", "listed", "diagonal")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEAD_DIM, MOST_BLOCK, MOST_GROUP, MOST_SLOTS = 256, 256, 64, 1024


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, block_size: int) -> str | None:
    """Why these kernels do not take the inputs: one sentence, or None if they do. Reads shapes, dtypes and devices only."""
    if not all(x.dim() == 4 for x in (q, k, v, indices)):
        return "q, k, v and indices must be four-dimensional (b, h, n, d)."
    (b, hq, n, dk), (hkv, m, dv), (hi, t) = q.shape, (k.shape[1], k.shape[2], v.shape[3]), indices.shape[1::2]
    if k.shape != (b, hkv, m, dk) or v.shape != (b, hkv, m, dv) or indices.shape != (b, hi, n, t):
        return "the shapes of q, k, v and indices do not belong together."
    if hkv and (hi % hkv or hi == 0 or hq % hi):
        return f"{hkv} key/value heads must divide {hi} index heads, and those {hq} query heads."
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v must share one dtype of float16, bfloat16 and float32, not {q.dtype}, {k.dtype}, {v.dtype}."
    if indices.dtype not in (torch.int32, torch.int64):
        return f"indices must be int32 or int64, not {indices.dtype}."
    if max(dk, dv) > MOST_HEAD_DIM or min(dk, dv) < 1:
        return f"head dimensions {dk} and {dv} must be between 1 and {MOST_HEAD_DIM}."
    if not 1 <= block_size <= MOST_BLOCK:
        return f"block size {block_size} must be between 1 and {MOST_BLOCK}."
    if hi and hq // hi > MOST_GROUP:
        return f"{hq // hi} query heads per index list are more than {MOST_GROUP}."
    if t > MOST_SLOTS:
        return f"{t} blocks per query are more than {MOST_SLOTS}."
    if len({x.device for x in (q, k, v, indices)}) != 1:
        return "q, k, v and indices must be on one device."
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0."
    device, group = device_of(q), hq // hi if hi else 1
    d, e = power_of_two(dk, 16), power_of_two(dv, 16)
    for launch, memory in (
        (forward_launch(group, block_size, dk, dv, q.dtype, device), forward_shared_memory),
        (backward_launch(group, block_size, dk, dv, q.dtype, device), backward_shared_memory),
    ):
        needed = memory(launch.rows, launch.keys, d, e, q.element_size(), launch.stages)
        if needed > device.shared_memory:
            return f"a tile needs {needed} bytes of shared memory, the device has {device.shared_memory}."
    return None


def selected_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    scale: float,
    rule: str,
    q_offset: int,
    q_offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query over the blocks it lists.

    Args:
        q: (b, hq, n, dk) float16, bfloat16 or float32.
        k: (b, hkv, m, dk), same dtype.
        v: (b, hkv, m, dv), same dtype.
        indices: (b, hi, n, t) int32 or int64, a set per query: negative entries, entries past the last block and
            repetitions count for nothing, in any place.
        block_size: Keys of a block.
        scale: Factor of the logits.
        rule: ``"causal"`` (key <= position), ``"listed"`` (the whole block) or ``"diagonal"`` (causal inside the query's
            own block only).
        q_offset: Query i stands at position ``i + q_offset``, unless `q_offsets` is given.
        q_offsets: (b,) integers on the device, one offset per batch row, or None.

    Returns:
        out (b, hq, n, dv), contiguous, of q's dtype, and lse (b, hq, n) float32, natural logarithm. A query that sees no
        key gets 0 and -inf.

    Raises:
        ValueError: for an unknown rule or inputs that `supports` refuses.
    """
    _check(q, k, v, indices, block_size, rule)
    with current_device(q):
        out, lse = forward(*map(align, (q, k, v)), indices, block_size, scale, rule, Positions(q_offset, q_offsets))
    return narrow(out, v.shape[-1]), lse


def selected_attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    scale: float,
    rule: str,
    q_offset: int,
    q_offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `selected_attention_forward`.

    Under `torch.use_deterministic_algorithms(True)` two runs agree bit for bit; otherwise sums across work items are float32
    atomics, whose order varies.

    Args:
        dout: (b, hq, n, dv) gradient of out.
        dlse: (b, hq, n) gradient of lse, or None.
        q, k, v, indices, block_size, scale, rule, q_offset, q_offsets: As in forward.
        out: (b, hq, n, dv) from forward.
        lse: (b, hq, n) float32 from forward.

    Returns:
        dq (b, hq, n, dk), dk (b, hkv, m, dk), dv (b, hkv, m, dv), contiguous, of the inputs' dtype.

    Raises:
        ValueError: for an unknown rule or inputs that `supports` refuses.
    """
    _check(q, k, v, indices, block_size, rule)
    aligned = [align(x) for x in (q, k, v, out)]
    with current_device(q):
        dq, dk, dv = backward(
            align(dout.to(q.dtype)), dlse, *aligned, lse.contiguous(), indices, block_size, scale, rule,
            Positions(q_offset, q_offsets), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    return narrow(dq, q.shape[-1]), narrow(dk, k.shape[-1]), narrow(dv, v.shape[-1])


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, block_size: int, rule: str
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}.")
    if (why := supports(q, k, v, indices, block_size)) is not None:
        raise ValueError(f"selected attention: {why}")
