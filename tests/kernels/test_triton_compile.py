"""The attention kernels compile for sm_80, sm_90 and sm_100 as they would be launched there, without a GPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels under test are written in Triton")

from fsa_compile.kernels.triton import banded_launch, block_selection, launch  # noqa: E402

KIB = 1024
TARGETS = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
"""Compute capability x 10: bytes of shared memory that one program may have."""

VARIANTS = [
    dict(group=4, block_size=64, dk=128, dv=128, dtype="bfloat16"),
    dict(group=16, block_size=128, dk=128, dv=128, dtype="bfloat16", slots=8),
    dict(group=6, block_size=256, dk=192, dv=128, dtype="bfloat16", rule="diagonal"),
    dict(group=1, block_size=64, dk=256, dv=256, dtype="float16", rule="listed"),
    dict(group=2, block_size=16, dk=64, dv=64, dtype="float32", slots=5),
    dict(group=2, block_size=64, dk=64, dv=64, dtype="bfloat16", deterministic=True),
]

GLUON = [
    dict(group=4, block_size=64, dk=128, dv=128, dtype="bfloat16"),
    dict(group=16, block_size=128, dk=128, dv=128, dtype="bfloat16", slots=8),
    dict(group=3, block_size=128, dk=64, dv=128, dtype="float16", rule="diagonal", slots=8),
    dict(group=1, block_size=128, dk=128, dv=64, dtype="bfloat16", rule="listed", slots=200),
    dict(group=2, block_size=96, dk=64, dv=64, dtype="bfloat16", deterministic=True),
]
"""What the kernels for Hopper take: two 16-bit types, head dimensions of 64 and 128."""

BANDED = [
    dict(rule="window", group=4, dk=128, dv=128, dtype="bfloat16"),
    dict(rule="compressed", group=4, dk=128, dv=128, dtype="bfloat16"),
    dict(rule="compressed", group=16, dk=192, dv=128, dtype="bfloat16"),
    dict(rule="window", group=1, dk=256, dv=256, dtype="float16"),
    dict(rule="compressed", group=2, dk=64, dv=64, dtype="float32"),
    dict(rule="window", group=2, dk=64, dv=64, dtype="bfloat16"),
    dict(rule="window", group=2, dk=40, dv=24, dtype="bfloat16"),
]

SELECTION = [
    dict(rule="sum", group=4, d=128, block_size=64, dtype="bfloat16"),
    dict(rule="max", group=2, d=64, block_size=128, dtype="float16"),
]


def compile_for(capability: int, variants: list[dict], *options: str) -> list[dict]:
    """One row per kernel, from ``compile_kernels.py`` in a process without TRITON_INTERPRET."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program), str(capability), str(TARGETS[capability]), json.dumps(variants), *options],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", TARGETS, ids="sm_{}".format)
def test_kernels_compile_and_fit(capability):
    """Every variant compiles; memory stays below the limit and below the estimate that `supports` relies on."""
    rows, device = compile_for(capability, VARIANTS), launch.Device(capability, TARGETS[capability])
    heavy = [r for r in rows if r["kernel"] in ("_partial_kernel", "_dense_kernel", "_gradient_kernel")]
    assert len(heavy) == 3 * len(VARIANTS)
    assert {"_count_kernel", "_layout_kernel", "_fill_kernel", "_merge_kernel", "_delta_kernel",
            "_sum_entries_kernel", "_sum_items_kernel"} <= {r["kernel"] for r in rows}  # fmt: skip
    assert all(r["shared"] <= TARGETS[capability] for r in rows)
    for r in heavy:
        x, itemsize = r["variant"], 4 if r["variant"]["dtype"] == "float32" else 2
        choose, memory = {
            "_partial_kernel": (launch.forward_launch, launch.forward_shared_memory),
            "_dense_kernel": (functools.partial(_dense_launch, x.get("slots", 16)), launch.dense_shared_memory),
            "_gradient_kernel": (launch.backward_launch, launch.backward_shared_memory),
        }[r["kernel"]]
        chosen = choose(x["group"], x["block_size"], x["dk"], x["dv"], _dtype(x["dtype"]), device)
        dk, dv = launch.power_of_two(x["dk"], 16), launch.power_of_two(x["dv"], 16)
        assert r["shared"] <= memory(chosen.rows, chosen.keys, dk, dv, itemsize, chosen.stages)
    # A few hundred bytes of spills are the price of dK, dV and dQ at once; kilobytes are ptxas giving up on a tile.
    assert all(r["spills"] is None or r["spills"] <= 1024 for r in rows)
    if capability == 90:
        assert not any(r["unset"] for r in rows)
        half = [r for r in heavy if r["variant"]["dtype"] != "float32"]
        assert all(r["wgmma"] and r["wide_load"] for r in half)  # Hopper's matrix units, 16-byte loads
        atomic = [r for r in half if r["kernel"] == "_gradient_kernel" and "deterministic" not in r["variant"]]
        assert all(r["wide_red"] and not r["narrow_red"] for r in atomic)  # dK and dV are added four floats at a time


def test_gluon_kernels_compile_and_fit():
    """As above: little spills, and the matrix units are fed by 16-byte copies."""
    rows, device = compile_for(90, GLUON, "gluon"), launch.Device(90, TARGETS[90], gluon=True)
    taken = [r for r in rows if r["kernel"] in ("partial_kernel", "dense_kernel", "gradient_kernel")]
    # Backward takes all of these, forward head dimensions of 128: lists of blocks of 128 keys, and dense blocks of any size.
    square = [x for x in GLUON if x["dk"] == x["dv"] == 128]
    expected = {"gradient_kernel": GLUON, "partial_kernel": [x for x in square if x["block_size"] == 128], "dense_kernel": square}
    assert {name: [r["variant"] for r in taken if r["kernel"] == name] for name in expected} == expected
    for r in taken:
        x = r["variant"]
        choose, memory = {
            "partial_kernel": (launch.forward_launch, launch.forward_shared_memory),
            "dense_kernel": (functools.partial(_dense_launch, x.get("slots", 16)), launch.dense_shared_memory),
            "gradient_kernel": (launch.backward_launch, launch.backward_shared_memory),
        }[r["kernel"]]
        chosen = choose(x["group"], x["block_size"], x["dk"], x["dv"], _dtype(x["dtype"]), device)
        assert chosen.hopper and chosen.warps == r["num_warps"]
        assert r["shared"] <= memory(chosen.rows, chosen.keys, x["dk"], x["dv"], 2, chosen.stages) <= TARGETS[90]
        assert r["wgmma"] and r["wide_load"] and not r["unset"] and not r["narrow_red"]
        # Two programs of the dense kernel share a multiprocessor: 128 registers a thread, and the addresses do not all fit.
        assert r["spills"] is None or r["spills"] <= (128 if r["kernel"] == "dense_kernel" else 64)


@pytest.mark.parametrize("capability", TARGETS, ids="sm_{}".format)
def test_banded_kernels_compile_and_fit(capability):
    """As above, with few spills: what leaves the registers are addresses and masks between the two loops over tiles."""
    rows, device = compile_for(capability, BANDED), launch.Device(capability, TARGETS[capability])
    heavy = [r for r in rows if r["kernel"] != "_statistics_kernel"]
    assert len(heavy) == 3 * len(BANDED)
    for r in heavy:
        x = r["variant"]
        chosen, memory = _banded_choice(r["kernel"], x, device)
        assert (chosen.warps, chosen.stages) == (r["num_warps"], r["num_stages"])
        dk, dv = launch.power_of_two(x["dk"], 16), launch.power_of_two(x["dv"], 16)
        estimate = memory(chosen.rows, chosen.keys, dk, dv, _dtype(x["dtype"]).itemsize, chosen.stages)
        assert r["shared"] <= estimate <= TARGETS[capability]
    assert all(r["spills"] is None or r["spills"] <= 384 for r in rows)
    if capability == 90:
        assert not any(r["unset"] for r in rows)
        assert all(r["wgmma"] and r["wide_load"] for r in heavy if r["variant"]["dtype"] != "float32")


@pytest.mark.parametrize("capability", TARGETS, ids="sm_{}".format)
def test_the_selection_kernel_compiles_and_fits(capability):
    """As above; on Hopper the sums over heads and over the keys of a block stay in registers, so that only lists spill."""
    rows, device = compile_for(capability, SELECTION), launch.Device(capability, TARGETS[capability])
    assert len(rows) == len(SELECTION)
    for r in rows:
        x = r["variant"]
        heads, per_block = (x["group"], x["block_size"] // 16) if x["rule"] == "sum" else (1, x["block_size"])
        chosen = block_selection.selection_launch(heads, per_block, x["d"], _dtype(x["dtype"]), device)
        estimate = block_selection.shared_memory(chosen.queries * chosen.heads, chosen.keys, x["d"], 2, chosen.stages)
        assert r["shared"] <= estimate <= TARGETS[capability]
        assert r["spills"] is None or r["spills"] <= 1024
        if capability == 90:
            assert r["wgmma"] and r["wide_load"] and not r["unset"]


def test_unset_registers_are_found():
    """The instructions of the kernel that ptxas 12.8 got wrong: UR18 is changed, and used by wgmma, before it has a value."""
    from compile_kernels import unset_registers

    wrong = """
        /*0030*/                   ULDC.64 UR24, c[0x0][0x208] ;
        /*1960*/                   ULEA UR14, UR24, UR25, 0x18 ;
        /*1da0*/                   UMOV UR15, 0x80000020 ;
        /*1de0*/              @!P0 UIADD3 UR18, UP0, UR18, 0x40, URZ ;
        /*4e30*/                   HGMMA.64x32x16.F32.BF16 R56, R24, gdesc[UR12].tnspB, R56 ;
        /*4e80*/                   HGMMA.64x32x16.F32.BF16 R56, R28, gdesc[UR16].tnspB, R56 ;"""
    assert unset_registers(wrong) == ["1de0 UR18", "4e80 UR19"]
    assert unset_registers(wrong.replace("UR18, UP0, UR18, 0x40", "UR18, UP0, UR14, 0x40").replace("UIADD3", "UIADD3.64")) == []
    assert unset_registers(wrong.replace("R28, gdesc", "gdesc")) == ["1de0 UR18", "4e80 UR16", "4e80 UR17", "4e80 UR19"]


def _banded_choice(kernel: str, variant: dict, device: launch.Device):
    """The launch of a banded kernel and the function that estimates its shared memory."""
    shape = variant["group"], variant["dk"], variant["dv"], _dtype(variant["dtype"]), device
    if kernel == "_banded_forward_kernel":
        return banded_launch.forward_launch(*shape, variant["rule"] == "window"), banded_launch.forward_shared_memory
    if kernel == "_banded_dq_kernel":
        return banded_launch.dq_launch(*shape, variant["rule"] == "window"), banded_launch.dq_shared_memory
    seen_by = 512 if variant["rule"] == "window" else 4096
    return banded_launch.dkv_launch(*shape, seen_by), banded_launch.dkv_shared_memory


def _dense_launch(slots: int, group: int, *shape):
    """The dense kernel's launch, arguments in the order of the others."""
    return launch.dense_launch(group, slots, *shape)


def _dtype(name: str):
    import torch

    return getattr(torch, name)
