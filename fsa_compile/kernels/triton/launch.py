"""Launch parameters: pure functions of the shape, never of the data, no autotuning.

A tile of the selected-attention kernels is `rows` (query, head) pairs by `keys` keys of one block. Both are powers of two
of at least 16, what `tl.dot` needs; `rows >= 64` is what Hopper's wgmma needs. The choices were measured on an H100
(``docs/kernels/selected.md``); tiles shrink until their shared memory fits. The estimates of it are upper bounds, checked
against the compiler in ``tests/kernels/test_triton_compile.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

PLAN_BYTES = 64 << 20
"""Most bytes of plan alive at once, unless one lane alone needs more."""
PLAN_ENTRY_BYTES = 12
"""What the plan keeps per query and slot: block, rank, order."""
WHOLE_BYTES = 576 << 20
"""Bytes of partials, or of dQ per entry, up to which all goes in one launch: launches cost more where sequences are short."""
PARTIAL_BYTES = 256 << 20
"""Most bytes of forward partials alive at once otherwise, in two buffers."""
GRADIENT_BYTES = 448 << 20
"""Most bytes of dQ per entry alive at once otherwise, in two buffers: larger slices have longer work items, less dK to add."""
DKV_BYTES = 144 << 20
"""Most bytes of float32 dK and dV alive at once, unless one key/value head alone needs more."""


@dataclass(frozen=True)
class Device:
    """What of a GPU decides the launch.

    Args:
        capability: Compute capability times ten.
        shared_memory: Bytes of shared memory that one program may use.
        gluon: Whether kernels written in Gluon for this capability may run. Triton's interpreter has none.
    """

    capability: int
    shared_memory: int
    gluon: bool = False


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
        transposed: Backward keeps dK and dV as (d, keys).
        hopper: The kernel in Gluon for Hopper runs, where strides let it.
    """

    rows: int
    queries: int
    keys: int
    item_queries: int
    warps: int
    stages: int
    registers: int | None = None
    transposed: bool = False
    hopper: bool = False


def power_of_two(x: int, least: int = 1) -> int:
    """The smallest power of two that is at least `x` and `least`."""
    return max(least, 1 << max(x - 1, 0).bit_length())


def slice_queries(n: int, query_bytes: int, budget: int) -> int:
    """Queries of a slice, of which each takes `query_bytes`: about equal slices of at most `budget` bytes, or 1/16 more.

    The sixteenth keeps a power of two from leaving a last slice of next to nothing, whose launches cost as much as another's.
    Slices are multiples of 64 queries where a budget holds so many, otherwise of 16, and hold at least 16.
    """
    most = max(16, (budget + budget // 16) // query_bytes)
    step = 64 if most >= 64 else 16
    most = most // step * step
    if n <= most:
        return n
    slices = -(-n // most)
    return min(most, -(-n // (slices * step)) * step)


def current_device(x: torch.Tensor) -> torch.cuda.device:
    """Makes the GPU that holds `x` the current one; does nothing where there is none."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def device_of(x: torch.Tensor) -> Device:
    """The GPU that holds `x`; an H100 where there is none (shapes are then checked, or kernels interpreted)."""
    if x.device.type != "cuda":
        return Device(90, 227 << 10)
    return _device(x.get_device())


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin, properties.major == 9)


def forward_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound of the forward kernel's shared memory in bytes: K, V, and `stages` copies of Q; P on its way to a dot."""
    return itemsize * (keys * (dk + dv) + stages * rows * dk + rows * keys) + 4 * rows * keys


def backward_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound of the backward kernel's shared memory in bytes: K, V, one or two copies of Q and dO; P and dS, or dQ.

    The third stage is that of the indices that Q and dO are loaded by.
    """
    return itemsize * (keys + min(stages, 2) * rows) * (dk + dv) + 4 * max(2 * rows * keys, rows * dk)


def dense_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound of the dense kernel's shared memory in bytes: Q, `stages` copies of K and V; P on its way to a dot."""
    return itemsize * (rows * max(dk, dv) + stages * keys * (dk + dv) + rows * keys) + 4 * rows * keys


@functools.cache
def forward_launch(group: int, block_size: int, dk: int, dv: int, dtype: torch.dtype, device: Device) -> Launch:
    """The forward kernel's parameters for `group` heads per index list.

    One stage and 128 registers, so that four programs share a multiprocessor, beat deeper pipelines: a program waits for
    scattered rows of Q, and another one computes meanwhile.
    """
    # Blocks of 64 keys: the Gluon kernel is 10 % faster alone, but the call is not (docs/kernels/selected.md).
    hopper = device.gluon and dtype.itemsize == 2 and dk == dv == 128 and block_size == 128 and group <= 64
    dk, dv = power_of_two(dk, 16), power_of_two(dv, 16)
    precise = dtype == torch.float32  # IEEE float32 dots run on the scalar units: small tiles, registers are scarce
    rows = max(power_of_two(group), 32 if precise else 64)
    keys = min(power_of_two(block_size, 16), 32 if precise else 128)
    rows, keys, stages = _shrink(forward_shared_memory, dk, dv, dtype, device, group, rows, keys, stages=1)
    registers = 128 if max(dk, dv, 2 * keys) <= 128 and rows == 64 and not precise else None
    return Launch(rows, rows // group, keys, 8 * (rows // group), 4, stages, registers, hopper=hopper)


@functools.cache
def dense_launch(
    group: int, slots: int, block_size: int, dk: int, dv: int, dtype: torch.dtype, device: Device
) -> Launch | None:
    """The dense kernel's parameters, or None where it does not run: lists of `slots` blocks too long to be sorted by tiles of
    queries, or too little shared memory for its tiles.

    `item_queries` are the queries that decide together which blocks are dense; `queries` of them share a program.
    """
    together = min(64 if group == 1 else 32, 2048 // power_of_two(slots))
    if together < 16:
        return None
    hopper = device.gluon and dtype.itemsize == 2 and dk == dv == 128 and block_size % 64 == 0 and power_of_two(group) == group <= 64
    dk, dv = power_of_two(dk, 16), power_of_two(dv, 16)
    precise = dtype == torch.float32
    rows = max(power_of_two(group), 32 if precise else 64)
    if hopper and power_of_two(group) * together >= 128:
        rows = 128
    keys = min(power_of_two(block_size, 16), 32 if precise else 64)
    rows, keys, stages = _shrink(dense_shared_memory, dk, dv, dtype, device, group, rows, keys, 1 if precise else 2)
    if dense_shared_memory(rows, keys, dk, dv, dtype.itemsize, stages) > device.shared_memory:
        return None
    queries = min(together, power_of_two(rows // group + 1) // 2)
    warps = rows // 16 if hopper else 8 if rows * max(dk, dv) > 8192 else 4
    return Launch(rows, queries, keys, together, warps, stages, 128 if hopper and rows == 128 else None, hopper=hopper)


@functools.cache
def backward_launch(group: int, block_size: int, dk: int, dv: int, dtype: torch.dtype, device: Device) -> Launch:
    """The backward kernel's parameters; dK and dV of a tile of keys stay in registers."""
    hopper = device.gluon and dtype.itemsize == 2 and {dk, dv} <= {64, 128} and block_size > 32 and group <= 128
    dk, dv = power_of_two(dk, 16), power_of_two(dv, 16)
    wide, precise = max(dk, dv), dtype == torch.float32
    keys = min(power_of_two(block_size, 16), 16 if precise else 64, max(16, 8192 // wide))
    if precise:
        rows, warps, stages = 32, 8 if wide > 64 else 4, 1
    elif device.capability < 90:  # mma.sync keeps its operands in registers
        rows, warps, stages = 64 if wide <= 128 else 32, 8 if wide > 64 else 4, 1
    else:
        rows = 128 if wide <= 128 and keys == 64 else 64
        warps = 8 if wide > 64 and keys > 16 else 4
        stages = 3 if device.capability < 100 else 1  # tcgen05 stages P and dS in shared memory instead
    if hopper:
        rows, warps = 128, 8
    rows = max(rows, power_of_two(group))
    rows, keys, stages = _shrink(backward_shared_memory, dk, dv, dtype, device, group, rows, keys, stages)
    transposed = device.capability >= 90 and not precise
    hopper &= (rows, keys) == (128, 64)
    return Launch(rows, rows // group, keys, 16 * (rows // group), warps, stages, transposed=transposed, hopper=hopper)


def _shrink(
    memory: Callable[[int, int, int, int, int, int], int],
    dk: int,
    dv: int,
    dtype: torch.dtype,
    device: Device,
    group: int,
    rows: int,
    keys: int,
    stages: int,
) -> tuple[int, int, int]:
    """Give up stages, keys, then rows (but never part of a group) until a tile fits, or nothing is left to give."""
    while memory(rows, keys, dk, dv, dtype.itemsize, stages) > device.shared_memory:
        if stages > 1:
            stages -= 1
        elif keys > 16:
            keys //= 2
        elif rows // 2 >= max(group, 16):
            rows //= 2
        else:
            break
    return rows, keys, stages
