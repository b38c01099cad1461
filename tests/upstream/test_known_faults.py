"""Faults of torch 2.13's own Inductor on the CPU, each kept as a test that shows it.

They matter here in two ways: a baseline that runs into one is no baseline, and whoever sees a compiled model differ from eager
should rule them out before looking for the fault in this package. A release of torch that mends one makes its test fail on
2.13.x and skip on others: then remove it.

* In a kernel tiled in two dimensions, a scatter-add by several threads adds the offset inside the tile twice
  (pytorch/pytorch#191837). Sums go to wrong places, or past the end of the buffer. Seen where gradients of overlapping windows
  are summed: the backward of `local_attention.LocalAttention`, and of `pad -> unfold -> einsum`. One thread, or
  `cpp.simdlen=1` (no vector code), is right.
* Attention whose softmax runs over the queries is fused to scaled dot product attention, whose softmax runs over the keys
  (pytorch/pytorch#196468).

Each case runs in a process of its own, because one of them destroys the heap: this file is also the script of that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from local_attention import LocalAttention
from torch import Tensor

RIGHT = 1e-5
"""Norm-wise bound for float32 results that only differ in rounding."""

pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="documents torch 2.13; other releases not examined"),
]
vector_code = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the fault is in vector code for AVX2 and AVX512"
)


def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The window branch of native-sparse-attention-pytorch: (b, h, n, d) each."""
    return LocalAttention(16, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False)(q, k, v)


def unfolded_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped queries (b, hkv, g, n, d) over the last 16 keys of (b, hkv, n, d)."""
    n, window = k.shape[2], 16
    keys, values = (F.pad(x, (0, 0, window - 1, 0)).unfold(2, window, 1) for x in (k, v))
    logits = torch.einsum("bhgid,bhidw->bhgiw", q, keys)
    position = torch.arange(n)[:, None] + torch.arange(window) - (window - 1)
    return torch.einsum("bhgiw,bhidw->bhgid", logits.masked_fill(position < 0, float("-inf")).softmax(-1), values)


def attention_over(axis: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention whose softmax runs over `axis`."""
    return lambda q, k, v: (torch.matmul(q, k.transpose(-2, -1)) * 0.25).softmax(dim=axis).matmul(v)


CASES = {
    "local_attention": (local_attention, ((2, 4, 64, 16),) * 3),
    "unfolded_window": (unfolded_window, ((1, 2, 2, 64, 16), (1, 2, 64, 16), (1, 2, 64, 16))),
    "softmax_over_queries": (attention_over(-2), ((2, 4, 96, 16),) * 3),
}


def results(fn: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output and input gradients of a random functional."""
    out = fn(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return dict(zip(("out", "q", "k", "v"), (out.detach(), *torch.autograd.grad(out, inputs, upstream)), strict=True))


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm-wise difference of each tensor."""
    return {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}


def main(case: str, options: str) -> None:
    """The child process: prints how far Inductor is from eager, and, where asked, from the function it mistook it for."""
    fn, shapes = CASES[case]
    inputs = [torch.randn(s, generator=torch.Generator().manual_seed(i)).requires_grad_() for i, s in enumerate(shapes)]
    compiled = results(torch.compile(fn, fullgraph=True, options=json.loads(options)), inputs)
    found = {"eager": errors(compiled, results(fn, inputs))}
    if case == "softmax_over_queries":
        found["softmax over keys"] = errors(compiled, results(attention_over(-1), inputs))
    print(json.dumps(found))


def run(case: str, **options: int) -> subprocess.CompletedProcess[str]:
    """`main` in a process with two threads, whatever the environment says: with one, the scatter is right."""
    command = [sys.executable, __file__, case, json.dumps({name.replace("__", "."): value for name, value in options.items()})]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=240)


def differences(process: subprocess.CompletedProcess[str]) -> dict[str, dict[str, float]]:
    """What `main` printed, from a process that must have ended well."""
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


@vector_code
def test_local_attention_backward_corrupts_the_heap() -> None:
    # The scatter writes past its buffer on every run; whether malloc notices is up to what lies there. It did in 12 of 12 runs.
    # A run that survives shows a wrong key or value gradient instead.
    process = run("local_attention")
    if process.returncode == 0:
        error = differences(process)["eager"]
        assert max(error["k"], error["v"]) > 0.1
    else:
        assert process.returncode < 0, f"a signal was expected, not an exception:\n{process.stderr[-2000:]}"


@vector_code
def test_local_attention_without_vector_code_is_right() -> None:
    assert max(differences(run("local_attention", cpp__simdlen=1))["eager"].values()) < RIGHT


@vector_code
def test_unfolded_window_gets_a_wrong_key_gradient() -> None:
    error = differences(run("unfolded_window"))["eager"]
    assert error.pop("k") > 0.5
    assert max(error.values()) < RIGHT


@vector_code
def test_unfolded_window_without_vector_code_is_right() -> None:
    assert max(differences(run("unfolded_window", cpp__simdlen=1))["eager"].values()) < RIGHT


def test_softmax_over_queries_becomes_softmax_over_keys() -> None:
    error = differences(run("softmax_over_queries"))
    assert min(error["eager"].values()) > 0.1
    assert max(error["softmax over keys"].values()) < RIGHT


if __name__ == "__main__":
    main(*sys.argv[1:])
