"""Launching a kernel a second time without asking Triton again what to compile.

`JITFunction.run` inspects every argument at every call, which takes longer than most kernels of a sequence of 8192 tokens
run. What it would find is a function of a few things: those are the key here, and the compiled kernel is kept.
"""

from __future__ import annotations

from typing import Any

import torch

_COMPILED: dict[tuple, Any] = {}


def run(
    kernel: Any,
    programs: int,
    tensors: tuple[torch.Tensor, ...],
    fixed: tuple[int, ...],
    varying: tuple[int | float, ...],
    constants: dict[str, Any],
    stream: torch.cuda.Stream | None = None,
    **options: Any,
) -> None:
    """Launch `kernel` with `programs` programs. Its parameters are `tensors`, `fixed`, `varying` and `constants`, in that order.

    Args:
        kernel: A `triton.jit` function.
        programs: Size of the grid.
        tensors: Tensors, on one device.
        fixed: Integers that the kernel may be specialised to: one compilation for each combination of values.
        varying: Floats, and integers that are in its ``do_not_specialize``.
        constants: ``tl.constexpr`` parameters.
        stream: Where to launch; None for the current stream.
        options: Launch options of Triton, ``num_warps`` and so on.
    """
    pointers = [x.data_ptr() for x in tensors]
    together = 0
    for pointer in pointers:
        together |= pointer
    usual = tensors[0].is_cuda and together % 16 == 0
    if usual and all(-(2**31) <= x < 2**31 for x in varying):  # beyond 32 bits an integer has another type
        values = tuple(constants.values())
        types = tuple(x.dtype for x in tensors)
        key = (id(kernel), tensors[0].get_device(), types, fixed, values, tuple(options.values()))
        compiled = _COMPILED.get(key)
        if compiled is not None:
            handle = None if stream is None else stream.cuda_stream
            compiled[(programs, 1, 1)](*pointers, *fixed, *varying, *values, stream=handle)
            return
    else:
        key = None
    with torch.cuda.stream(stream):
        compiled = kernel[(programs,)](*tensors, *fixed, *varying, **constants, **options)
    if key is not None:
        _COMPILED[key] = compiled


_SIDE: dict[int, torch.cuda.Stream] = {}


def fork(x: torch.Tensor) -> torch.cuda.Stream | None:
    """A second stream on the device of `x`, which waits for what the current stream has been given; None on a CPU."""
    if not x.is_cuda:
        return None
    device = x.get_device()
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device)
    _SIDE[device].wait_stream(torch.cuda.current_stream(device))
    return _SIDE[device]


def join(stream: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for what `stream` has been given."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
