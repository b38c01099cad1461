"""What all tests share, in the environment.

Triton kernels run on the CPU where there is no GPU: Triton reads the variable when it is first imported. Every rewrite that a
test makes is also compared with the user's code in float64 (``options={"differential": True}``).
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("FSA_DIFFERENTIAL", "1")

# A program that needs Triton, not a test module: `--doctest-modules` would import it.
collect_ignore = ["kernels/compile_kernels.py"]
