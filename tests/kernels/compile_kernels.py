"""Compiles the attention kernels for GPUs that are not there; run as a program by ``test_triton_compile.py``.

The product's own launch code runs on CPU tensors with every kernel launch replaced by a recorder, so what is compiled is
what a GPU would be asked to run: same constants, same specialisation of strides and pointers. A program of its own, because
under ``TRITON_INTERPRET=1`` the kernels cannot be compiled.

    python compile_kernels.py CAPABILITY LIMIT '[{"group": 4, ...}, ...]' [gluon]

A variant with a "rule" of "window" or "compressed" is banded attention, one with "sum" or "max" chooses blocks, any other is
selected attention. With "gluon" it compiles kernels in Gluon where the product would take them. It prints one JSON line per compiled kernel: kernel, variant, shared, registers, spills (bytes), uniform
registers read before they are set, and some PTX counts.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from fsa_compile.kernels.triton import banded_attention, banded_backward, banded_forward, block_selection
from fsa_compile.kernels.triton import selected_attention, selected_backward, selected_forward
from fsa_compile.kernels.triton.launch import Device

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
PTX = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "wide_red": r"(red|atom)\.\S*\.v[24]\.f32",
    "narrow_red": r"(red|atom)\.\S*add\.f32",
    "wide_load": r"(ld\.global\S*\.v4|cp\.async\.c[ag]\.shared\.global [^;]*0x10)",
}
"""What to count in the PTX: matrix instructions, reductions of several floats or of one, loads of 16 bytes."""

TO_UNIFORM = ("R2UR", "S2UR", "VOTEU", "REDUX", "CS2UR")
NOT_TO_UNIFORM = ("UTMA", "UBLK", "UCGABAR", "UISETP", "UPLOP3", "USETMAXREG", "USYNCS")
"""Instructions that write a uniform register although their name does not begin with U, and the other way round."""


@contextlib.contextmanager
def recorded_launches():
    """Kernel launches inside are appended to the list instead of run."""
    launches = []
    original = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append((self, args, kwargs))
    try:
        yield launches
    finally:
        JITFunction.run = original


def source_of(kernel, args, kwargs):
    """The `ASTSource` and options that `kernel[grid](*args, **kwargs)` would compile."""
    names = [p.name for p in kernel.params]
    options = {name: kwargs[name] for name in kwargs if name not in names}
    values = dict(zip(names, args)) | {name: kwargs[name] for name in kwargs if name in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constexprs=constants, attrs=attributes), options


def record(group, block_size, dk, dv, dtype, rule="causal", slots=16, deterministic=False, n=256):
    """The launches of one forward and one backward with two key/value heads."""
    q, k, v = (torch.zeros(1, h, n, d, dtype=getattr(torch, dtype)) for h, d in ((2 * group, dk), (2, dk), (2, dv)))
    indices = torch.zeros(1, 2, n, slots, dtype=torch.int32)
    torch.use_deterministic_algorithms(deterministic)
    with recorded_launches() as launches:
        out, lse = selected_attention.selected_attention_forward(q, k, v, indices, block_size, 0.1, rule, 0, None)
        selected_attention.selected_attention_backward(out, lse, q, k, v, out, lse, indices, block_size, 0.1, rule, 0, None)
    return launches


def record_banded(group, rule, dk, dv, dtype, n=4096):
    """The launches of one forward and one backward with two key/value heads: a window, or compressed keys of stride 16."""
    m, band = {
        "window": (n, banded_attention.BandRule(window=512)),
        "compressed": (n // 16, banded_attention.BandRule(stride=16, last=31)),
    }[rule]
    q, k, v = (
        torch.zeros(1, h, r, d, dtype=getattr(torch, dtype)) for h, r, d in ((2 * group, n, dk), (2, m, dk), (2, m, dv))
    )
    with recorded_launches() as launches:
        out, lse = banded_attention.banded_attention_forward(q, k, v, 0.1, band)
        banded_attention.banded_attention_backward(out, lse, q, k, v, out, lse, 0.1, band)
    return launches


def record_selection(group, rule, d, block_size, dtype, n=4096):
    """The launch that chooses blocks, by probability ("sum": compressed keys of stride 16) or by the largest logit ("max")."""
    q = torch.zeros(1, 2 * group, n, d, dtype=getattr(torch, dtype))
    with recorded_launches() as launches:
        if rule == "sum":
            k, lse = torch.zeros(1, 2, n // 16 - 1, d, dtype=q.dtype), torch.zeros(1, 2 * group, n)
            block_selection.select_blocks(q, k, lse, 0.1, 16, 31, 0, 32, block_size, n, 16, 1, 2, 0, None)
        else:
            k = torch.zeros(1, 2, n, d, dtype=q.dtype)
            block_selection.select_blocks_by_max(q, k, block_size, 16, 0, 1, 0, None)
    return launches


RECORDERS = {"window": record_banded, "compressed": record_banded, "sum": record_selection, "max": record_selection}
"""What to record for a variant's rule, unless it is one of selected attention."""


def disassembled(cubin):
    """Registers and spilled bytes of a thread, and `unset_registers`; all None where cuobjdump is missing."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {"registers": None, "spills": None, "unset": None}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spills = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "spills": spills, "unset": unset_registers(text)}


def unset_registers(sass):
    """Uniform registers that the listing reads before it writes them, as "address register".

    ptxas 12.8 did that to the descriptors of wgmma in a kernel of ours that loaded tiles element by element: garbage, or an
    illegal address. Reading the listing from top to bottom is enough, as the first use of a register is not behind a jump.
    """
    written, unset = set(), []
    for address, name, operands in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", sass):
        read = [int(x) for x in re.findall(r"\bUR(\d+)\b", operands)]
        writes = name.startswith(TO_UNIFORM) or name[0] == "U" and not name.startswith(NOT_TO_UNIFORM)
        target = read.pop(0) if writes and read else None
        descriptors = re.match(r"R\d+, (R\d+, )?gdesc\[UR(\d+)\]", operands)
        if descriptors:  # a and b in four registers; only b, in the upper two, if a comes from vector registers
            first = int(descriptors[2])
            read = range(first + 2 if descriptors[1] else first, first + 4)
        unset += [f"{address} UR{x}" for x in read if x not in written]
        if target is not None:
            wide = 2 if re.search(r"\.(64|WIDE)", name) else 1
            written.update(range(target, target + wide))
    return unset


def main():
    """Compile every distinct kernel of every variant for one target."""
    capability, limit, variants, gluon = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), "gluon" in sys.argv
    banded = banded_attention, banded_forward, banded_backward
    for module in (selected_attention, selected_forward, selected_backward, *banded, block_selection):
        module.device_of = lambda x: Device(capability, limit, gluon)
    seen = set()
    for variant in variants:
        record_variant = RECORDERS.get(variant.get("rule"), record)
        for kernel, args, kwargs in record_variant(**variant):
            source, options = source_of(kernel, args, kwargs)
            options = {key: value for key, value in options.items() if value is not None}
            identity = (source.hash(), tuple(sorted(options.items())))
            if identity in seen:
                continue
            seen.add(identity)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            ptx = compiled.asm["ptx"]
            counts = {name: len(re.findall(pattern, ptx)) for name, pattern in PTX.items()}
            what = {"kernel": kernel.fn.__name__, "variant": variant, "capability": capability, **options}
            cost = {"shared": compiled.metadata.shared, **disassembled(compiled.asm["cubin"])}
            print(json.dumps({**what, **cost, **counts}), flush=True)


if __name__ == "__main__":
    main()
