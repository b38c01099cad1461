"""The memory layout that the attention kernels are compiled for: rows of a multiple of 16 elements on 16-byte boundaries.

Triton compiles a kernel per divisibility by 16 of its pointers and strides. Where all of them are divisible, tiles arrive 16
bytes at a time; where one is not, element by element, which is slow, and which ptxas 12.8 (part of Triton 3.6) once compiled
wrongly: it read the uniform registers of a wgmma descriptor before it wrote them (``docs/kernels/banded.md``). So the kernels
never see such tensors: they are copied here.
"""

from __future__ import annotations

import torch

ELEMENTS = 16
"""What row lengths and strides are multiples of, in elements; Triton's unit of specialisation."""
BYTES = 16
"""What every row's address is a multiple of."""


def align(x: torch.Tensor) -> torch.Tensor:
    """`x` (b, h, n, d) itself where it is aligned, else a copy whose head dimension is filled up with zeros.

    Zeros at the end of q and k, or of v, out and dout, change no product.

    Returns:
        (b, h, n, d rounded up to a multiple of 16).
    """
    d = x.shape[-1]
    if d % ELEMENTS == 0 and x.stride(-1) == 1 and x.data_ptr() % BYTES == 0:
        # The stride of a dimension of size 1 is never used, but it is a kernel argument.
        strides = (*(0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride())), 1)
        if all(stride % ELEMENTS == 0 for stride in strides[:-1]):
            return x if strides == x.stride() else x.as_strided(x.shape, strides)
    padded = x.new_zeros(*x.shape[:-1], -(-d // ELEMENTS) * ELEMENTS)
    padded[..., :d] = x
    return padded


def narrow(x: torch.Tensor, d: int) -> torch.Tensor:
    """The first d elements of every row of `x` (b, h, n, >= d), contiguous."""
    return x if x.shape[-1] == d else x[..., :d].contiguous()
