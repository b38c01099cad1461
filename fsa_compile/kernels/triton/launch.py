"""Launch parameters: pure functions of the shape, never of the data, no autotuning.

A tile of the selected-attention kernels is `rows` (query, head) pairs by `keys` keys of one block. Both are powers of two
of at least 16, what `tl.dot` needs; `rows >= 64` is what Hopper's wgmma needs. The largest tile whose shared memory fits
is taken; the estimates are upper bounds, checked against the compiler in ``tests/kernels/test_triton_compile.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PLAN_BYTES = 64 << 20
"""Most bytes of plan alive at once, unless one lane alone needs more."""
PLAN_ENTRY_BYTES = 12
"""What the plan keeps per query and slot: block, rank, order."""
PARTIAL_BYTES = 192 << 20
"""Most bytes of forward partials alive at once."""
DQ_BYTES = 32 << 20
"""Most bytes of float32 dQ that backward adds to at once: the atomics of one slice then stay inside Hopper's L2 (50 MB)."""
DKV_BYTES = 144 << 20
"""Most bytes of float32 dK and dV alive at once, unless one key/value head alone needs more."""


@dataclass(frozen=True)
class Launch:
    """How one of the two attention kernels runs.

    Args:
        rows: (query, head) rows of a tile.
        queries: Queries of a tile, ``rows // group``.
        keys: Keys of a tile; a divisor of the padded block.
        item_queries: Most queries of a work item; a multiple of `queries`.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        registers: Most registers of a thread, None for the compiler's choice.
    """

    rows: int
    queries: int
    keys: int
    item_queries: int
    warps: int
    stages: int
    registers: int | None = None


def power_of_two(x: int, least: int = 1) -> int:
    """The smallest power of two that is at least `x` and `least`."""
    return max(least, 1 << max(x - 1, 0).bit_length())


def slice_queries(n: int, query_bytes: int, budget: int) -> int:
    """Queries of a slice that takes at most `budget` bytes at `query_bytes` each: all n, or a multiple of 16 and at least that."""
    return min(n, max(16, budget // query_bytes // 16 * 16))


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on `device`; Hopper's 227 KiB where there is no GPU to ask."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def forward_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound of the forward kernel's shared memory in bytes: K, V, and `stages` copies of Q; P on its way to a dot."""
    return itemsize * (keys * (dk + dv) + stages * rows * dk + rows * keys) + 4 * rows * keys


def backward_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound of the backward kernel's shared memory in bytes: K, V, `stages` copies of Q and dO; P, dS and dQ."""
    scores, gradient = 4 * 2 * rows * keys, 4 * rows * dk
    # float32 dots run one after the other and share their staging; wgmma and tcgen05 keep operands of several in flight.
    staging = max(scores, gradient) if itemsize == 4 else scores + gradient
    return itemsize * (keys + stages * rows) * (dk + dv) + staging


def forward_launch(group: int, block_size: int, dk: int, dv: int, dtype: torch.dtype, limit: int) -> Launch:
    """The forward kernel's parameters for `group` heads per index list on a device with `limit` bytes of shared memory."""
    dk, dv = power_of_two(dk, 16), power_of_two(dv, 16)
    precise = dtype == torch.float32  # IEEE float32 dots run on the scalar units: small tiles, registers are scarce
    rows = max(power_of_two(group), 32 if precise else 64)
    keys = min(power_of_two(block_size, 16), 32 if precise else 128)
    rows, keys, stages = _shrink(
        lambda *tile: forward_shared_memory(*tile[:2], dk, dv, dtype.itemsize, tile[2]), limit, group, rows, keys, 1 if precise else 2
    )
    queries = rows // group
    return Launch(rows, queries, keys, item_queries=8 * queries, warps=4, stages=stages)


def backward_launch(group: int, block_size: int, dk: int, dv: int, dtype: torch.dtype, limit: int) -> Launch:
    """The backward kernel's parameters; as `forward_launch`, with dK and dV of a tile in registers as well."""
    dk, dv = power_of_two(dk, 16), power_of_two(dv, 16)
    precise = dtype == torch.float32
    rows = max(power_of_two(group), 32 if precise else 64)
    # dK and dV take keys * (dk + dv) float32 registers of the program's warps * 32 * 255.
    keys = min(power_of_two(block_size, 16), 16 if precise else 64, max(16, (1 << 13) // max(dk, dv)))
    rows, keys, stages = _shrink(
        lambda *tile: backward_shared_memory(*tile[:2], dk, dv, dtype.itemsize, tile[2]), limit, group, rows, keys, 1 if precise else 2
    )
    queries = rows // group
    return Launch(rows, queries, keys, item_queries=8 * queries, warps=8 if dk + dv > 128 else 4, stages=stages)


def _shrink(
    memory: Callable[[int, int, int], int], limit: int, group: int, rows: int, keys: int, stages: int
) -> tuple[int, int, int]:
    """Give up keys, then stages, then rows (but never part of a group) until a tile fits, or nothing is left to give."""
    while memory(rows, keys, stages) > limit:
        if keys > 16:
            keys //= 2
        elif stages > 1:
            stages -= 1
        elif rows // 2 >= max(group, 16):
            rows //= 2
        else:
            break
    return rows, keys, stages
