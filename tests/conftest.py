"""Triton kernels run on the CPU where there is no GPU: Triton reads the variable when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A program that needs Triton, not a test module: `--doctest-modules` would import it.
collect_ignore = ["kernels/compile_kernels.py"]
