"""Masks in buffers on CUDA: rewritten, a change that torch knows of is followed, a hidden one is an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import fsa_compile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

N, WINDOW, DIM = 256, 32, 64
OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True}


def band(window: int) -> Tensor:
    i, j = torch.arange(N)[:, None], torch.arange(N)
    return (j <= i) & (i - j < window)


class Band(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", band(WINDOW))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT * DIM**-0.5).masked_fill(~self.mask[:n, :n], float("-inf")).softmax(-1) @ v


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    return tuple(torch.randn(1, 4, N, DIM, device="cuda", generator=generator) for _ in range(3))


def close(a: Tensor, b: Tensor) -> bool:
    """To within TF32: a window one key wider is off by 1e-2."""
    return bool((a - b).norm() <= 2e-3 * b.norm())


def test_a_change_is_followed() -> None:
    module, qkv = Band().cuda(), inputs()
    torch._dynamo.reset()
    call = torch.compile(module, backend="fsa", fullgraph=True, options=OPTIONS)
    assert close(call(*qkv), module(*qkv)) and fsa_compile.last_report().rewritten == 1
    before = module(*qkv)
    module.mask.copy_(band(WINDOW + 1))
    assert not close(before, module(*qkv))
    assert close(call(*qkv), module(*qkv))
    module.mask = band(WINDOW).cuda()
    assert close(call(*qkv), before)


def test_the_host_does_not_wait_for_an_unchanged_mask() -> None:
    module, qkv = Band().cuda(), inputs()
    torch._dynamo.reset()
    call = torch.compile(module, backend="fsa", fullgraph=True, options=OPTIONS)
    call(*qkv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


HIDDEN = """
import sys
sys.path.insert(0, sys.argv[1])
from test_buffers_gpu import *
module, qkv = Band().cuda(), inputs()
call = torch.compile(module, backend="fsa", fullgraph=True, options=OPTIONS)
call(*qkv)
module.mask.data.copy_(band(WINDOW + 1))
call(*qkv)
torch.cuda.synchronize()
print("no error")
"""


def test_a_hidden_change_is_an_error() -> None:
    """In a process of its own: a device-side assertion ends the context."""
    here = str(__file__).rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", HIDDEN, here], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "no error" not in done.stdout
    assert "assert" in done.stderr.lower()
