"""Launch parameters of banded attention: pure functions of the shape, never of the data, no autotuning.

A tile is `rows` (query, head) pairs by `keys` keys. The heads of a tile belong to one key/value head: `heads` is the largest
power of two, up to 16, that divides the group. Sharing a tile among heads instead of filling it with queries costs nothing
(K and V are read once per tile either way) and keeps the hull of the tile's bands narrow: 128 queries of a window of 512 keys
need 639 keys, 32 queries of four heads need 543.

Tiles shrink until the estimate of their shared memory fits; ``tests/kernels/test_triton_compile.py`` holds the estimates
against the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .launch import Device, power_of_two

PARTIAL_BYTES = 128 << 20
"""Most bytes of float32 dK and dV partials, unless one copy alone needs more."""
PROGRAMS = 1024
"""Programs that the dK/dV kernel should have: several per multiprocessor, because their lengths differ."""
LEAST_TILES = 8
"""Fewest query tiles worth a program of their own."""


@dataclass(frozen=True)
class BandLaunch:
    """How one banded kernel runs.

    Args:
        rows: (query, head) pairs of a tile.
        heads: Query heads of a tile, a power of two that divides the group.
        keys: Keys of a tile.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    rows: int
    heads: int
    keys: int
    warps: int
    stages: int

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return self.rows // self.heads


def tile_heads(group: int) -> int:
    """Query heads of a tile: the largest power of two, up to 16, that divides the group."""
    return min(group & -group, 16)


def forward_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound in bytes: Q, `stages` copies of K and V, P on its way to a dot."""
    return itemsize * (rows * dk + stages * keys * (dk + dv)) + 4 * rows * keys


def dq_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound in bytes: Q and dO, `stages` copies of K and V; dS, or on Blackwell K once more, on its way to a dot."""
    return itemsize * (rows + stages * keys) * (dk + dv) + max(4 * rows * keys, itemsize * keys * (dk + dv))


def dkv_shared_memory(rows: int, keys: int, dk: int, dv: int, itemsize: int, stages: int) -> int:
    """Upper bound in bytes: K and V, `stages` copies of Q, dO and two numbers a row, P and dS on their way to a dot."""
    return itemsize * (keys + stages * rows) * (dk + dv) + stages * 8 * rows + 4 * rows * keys


def forward_launch(group: int, dk: int, dv: int, dtype: torch.dtype, device: Device, window: bool = False) -> BandLaunch:
    """The forward kernel's parameters; `window`: a row sees a few tiles of keys, most of a tile's cost being latency."""
    wide = _wide(dk, dv)
    if dtype == torch.float32:  # IEEE float32 dots run on the scalar units: small tiles, registers are scarce
        tile = 32, 32, 4, 1
    elif wide > 128:
        tile = 128 if device.capability >= 90 else 64, 32, 8, 2
    elif device.capability != 90:
        tile = 128, 64, 8, 2
    elif window:
        tile = (128, 64, 8, 3) if wide <= 64 else (128, 32, 4, 3)
    else:
        tile = (128, 64, 4, 3) if wide <= 64 else (128, 64, 8, 3)
    return _fit(forward_shared_memory, group, dk, dv, dtype, device, *tile)


def dq_launch(group: int, dk: int, dv: int, dtype: torch.dtype, device: Device, window: bool = False) -> BandLaunch:
    """The dQ kernel's parameters; `window` as in `forward_launch`."""
    wide = _wide(dk, dv)
    if dtype == torch.float32:
        tile = 32, 16, 4, 1
    elif wide > 128:
        tile = 64, 32, 8, 2
    elif device.capability != 90:
        tile = 64 if wide > 64 and device.capability < 90 else 128, 64, 8, 2
    elif wide <= 64:
        tile = (64, 64, 4, 3) if window else (128, 64, 4, 3)
    else:
        tile = (64, 64, 4, 2) if window else (128, 64, 8, 3)
    return _fit(dq_shared_memory, group, dk, dv, dtype, device, *tile)


def dkv_launch(group: int, dk: int, dv: int, dtype: torch.dtype, device: Device, seen_by: int) -> BandLaunch:
    """The dK/dV kernel's parameters, for keys that about `seen_by` queries see.

    dK and dV of a tile of keys stay in registers. Twice as many keys halve what is read of Q and dO, and waste half a tile of
    queries more at either end of a window.
    """
    wide, long = _wide(dk, dv), seen_by >= 1024
    if dtype == torch.float32:
        tile = 16, 32, 8 if wide > 64 else 4, 1
    elif wide > 128:
        tile = 32, 64, 8, 2 if device.capability < 100 else 1
    elif device.capability == 90:
        tile = (64, 128, 8, 3) if long else (32, 64, 4, 3) if wide > 64 else (64, 64, 4, 2)
    elif wide <= 64:
        tile = (64, 128, 8, 2) if long else (64, 64, 4, 2)
    elif device.capability < 90:  # mma.sync keeps its operands in registers
        tile = 32, 64, 8, 2
    else:  # two stages spill: tcgen05 results come back through registers
        tile = 64, 64, 8, 1
    return _fit(dkv_shared_memory, group, dk, dv, dtype, device, *tile)


def query_splits(programs: int, tiles: int, copy_bytes: int) -> int:
    """Parts into which the dK/dV kernel cuts the queries of a tile of keys, a power of two.

    A compressed sequence has few keys, each seen by all later queries: one program per tile of keys would leave most of the
    device idle. Parts write float32 partials that are summed in a fixed order.

    Args:
        programs: Programs without a cut: tiles of keys times key/value heads times batch rows.
        tiles: Most query tiles that one of them walks over.
        copy_bytes: Bytes of one float32 copy of dK and dV.
    """
    parts = 1
    while programs * parts < PROGRAMS and tiles >= 2 * parts * LEAST_TILES and 2 * parts * copy_bytes <= PARTIAL_BYTES:
        parts *= 2
    return parts


def _wide(dk: int, dv: int) -> int:
    """The larger head dimension as the kernels pad it."""
    return power_of_two(max(dk, dv), 16)


def _fit(
    memory: Callable[[int, int, int, int, int, int], int],
    group: int,
    dk: int,
    dv: int,
    dtype: torch.dtype,
    device: Device,
    rows: int,
    keys: int,
    warps: int,
    stages: int,
) -> BandLaunch:
    """Give up stages, then rows and keys in turn, until a tile fits or nothing is left to give."""
    dk, dv = power_of_two(dk, 16), power_of_two(dv, 16)
    while memory(rows, keys, dk, dv, dtype.itemsize, stages) > device.shared_memory:
        if stages > 1:
            stages -= 1
        elif max(rows, keys) <= 16:
            break
        elif rows >= keys:
            rows //= 2
        else:
            keys //= 2
    return BandLaunch(rows, tile_heads(group), keys, warps, stages)
