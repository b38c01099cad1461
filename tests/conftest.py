"""What all tests share, in the environment.

Triton kernels run on the CPU where there is no GPU: Triton reads the variable when it is first imported. Every rewrite that a
test makes is also compared with the user's code in float64 (``options={"differential": True}``).
"""

import os
from importlib.metadata import version

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("FSA_DIFFERENTIAL", "1")

# A program that needs Triton, not a test module: `--doctest-modules` would import it.
collect_ignore = ["kernels/compile_kernels.py"]

INTERPRETED = ("test_triton_banded.py", "test_triton_selected.py", "test_triton_selection.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels are not interpreted by Triton 3.6, whose interpreter gets masked `atomic_add` wrong and needs NumPy before 2.4."""
    if torch.cuda.is_available() or tuple(map(int, version("triton").split(".")[:2])) >= (3, 7):
        return
    reason = f"the interpreter of Triton {version('triton')} adds in masked lanes of atomic_add; kernels run on a GPU there"
    for item in items:
        if item.path.name in INTERPRETED:
            item.add_marker(pytest.mark.skip(reason=reason))
