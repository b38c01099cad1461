"""The whole core of Native Sparse Attention on one GPU, kernel by kernel and as a sum, against full causal attention.

    python benchmarks/core.py [--lengths 8192 65536] [--groups 1 4 16] [--seconds 120] [--peer NAME=PATH] [--out results.json]

Compressed attention (kernel 32, stride 16), choosing 16 blocks of 64 (one initial, two local), selected attention, a window of
512, and three gates, compiled by Inductor as in a compiled model; bfloat16, four key/value heads of 128 dimensions, one sequence, memory as (b, n, h, d). Medians of
`triton.testing.do_bench` in milliseconds. `memory` is what a forward, and a forward with backward, allocate beyond inputs,
results and gradients, in MiB. `errors` are relative norms against float64 of each branch at the last 16 queries, given the blocks
that were chosen; `picks` counts lists among them in which float64 would choose another block. The file is written again after
each cell; an exception is kept as a cell's, or a peer's, result. A peer is a Python file with ``forward(q, k, v, gates) -> out``,
the same core with its own compression, differentiable in all four; gates (3, 1, 4 g, n, 1) of compressed, selected, window.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fsa_compile.kernels import reference
from fsa_compile.ops import compressed_attention, select_blocks, selected_attention, sliding_window_attention

KV_HEADS, HEAD_DIM = 4, 128
KERNEL, STRIDE, BLOCK, TOP_K, INITIAL, LOCAL, WINDOW = 32, 16, 64, 16, 1, 2, 512
CHECKED = 16
"""Queries whose results are compared with float64."""


@dataclass(frozen=True)
class Core:
    """Inputs of one cell: q (1, 4 g, n, d), k and v (1, 4, n, d), their compressed forms, and gates (3, 1, 4 g, n, 1)."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken for."""
        return self.q, self.k, self.v, self.k_cmp, self.v_cmp, self.gates

    def compressed(self) -> tuple[Tensor, Tensor]:
        """out and lse of compressed attention."""
        return compressed_attention(self.q, self.k_cmp, self.v_cmp, stride=STRIDE, last=KERNEL - 1, return_lse=True)

    def choose(self, lse: Tensor) -> Tensor:
        """Block lists (1, 4, n, 16)."""
        return select_blocks(
            self.q, self.k_cmp, lse, stride=STRIDE, kernel_size=KERNEL, block_size=BLOCK, n_keys=self.k.shape[2], top_k=TOP_K,
            n_init=INITIAL, n_local=LOCAL,
        )  # fmt: skip

    def selected(self, blocks: Tensor) -> Tensor:
        """out of selected attention."""
        return selected_attention(self.q, self.k, self.v, blocks, block_size=BLOCK)

    def window(self) -> Tensor:
        """out of window attention."""
        return sliding_window_attention(self.q, self.k, self.v, window=WINDOW)

    def gated(self, branches: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The gated sum."""
        return compiled_gated_sum()(self.gates, branches)

    def forward(self) -> Tensor:
        """All of it."""
        out, lse = self.compressed()
        return self.gated((out, self.selected(self.choose(lse.detach())), self.window()))


def gated_sum(gates: Tensor, branches: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """As a user writes it."""
    return sum(gate * branch for gate, branch in zip(gates, branches))


@functools.cache
def compiled_gated_sum() -> Callable[..., Tensor]:
    """`gated_sum` by Inductor: what the backend leaves to Inductor in a model."""
    return torch.compile(gated_sum, dynamic=False)


def draw(n: int, group: int, device: str) -> Core:
    """Normal q, k and v; compressed keys and values are means over 32 tokens, scaled to unit variance."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        rows = torch.randn(1, n, heads, HEAD_DIM, generator=generator, device=device)
        return rows.bfloat16().transpose(1, 2).requires_grad_()

    q, k, v = normal(KV_HEADS * group), normal(KV_HEADS), normal(KV_HEADS)
    means = (x.detach().float().unfold(2, KERNEL, STRIDE).mean(-1) * KERNEL**0.5 for x in (k, v))
    k_cmp, v_cmp = (x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in means)
    gates = torch.rand(3, 1, KV_HEADS * group, n, 1, generator=generator, device=device).bfloat16().requires_grad_()
    return Core(q, k, v, k_cmp, v_cmp, gates)


def accuracy(core: Core) -> dict[str, float]:
    """Relative errors of the branches at the last queries, and lists of them that differ from float64's."""
    with torch.no_grad():
        out, lse = core.compressed()
        blocks = core.choose(lse)
        got = {"compressed": out, "selected": core.selected(blocks), "window": core.window()}
    n, first, group = core.q.shape[2], max(0, core.q.shape[2] - CHECKED), core.q.shape[1] // KV_HEADS
    compressed = HEAD_DIM**-0.5, STRIDE, KERNEL - 1, 0
    wrong, square, picks = dict.fromkeys(got, 0.0), dict.fromkeys(got, 0.0), 0
    for head in range(KV_HEADS):  # one at a time: float64 keys for every query head would not fit
        own = slice(head * group, (head + 1) * group)
        q = core.q[:, own, first:].detach().double()
        k, v, k_cmp, v_cmp = (x[:, head : head + 1].detach().double() for x in core.leaves[1:5])
        listed = blocks[:, head : head + 1, first:]
        exact, lse = reference.compressed_attention(q, k_cmp, v_cmp, *compressed, first)
        want = {
            "compressed": exact,
            "selected": reference.selected_attention(q, k, v, listed, BLOCK, compressed[0])[0],
            "window": reference.sliding_window_attention(q, k, v, WINDOW, compressed[0])[0],
        }
        for name, x in want.items():
            wrong[name] += float((got[name][:, own, first:] - x).square().sum())
            square[name] += float(x.square().sum())
        best = reference.select_blocks(q, k_cmp, lse, *compressed, KERNEL, BLOCK, n, TOP_K, INITIAL, LOCAL, first)
        picks += int((listed != best).any(-1).sum())
    return {**{name: (wrong[name] / square[name]) ** 0.5 for name in got}, "picks": picks}


def forward_and_backward(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> None:
    """One step without an optimiser."""
    torch.autograd.grad(forward(), leaves, grad)


def extra_memory(step: Callable[[], object], kept: int) -> float:
    """Peak of what a step allocates beyond `kept` bytes of results, MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


@functools.cache
def load_peer(path: str) -> Callable[..., Tensor]:
    """The `forward` of a peer's adapter file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.forward


def failure(error: Exception) -> str:
    """What is kept of an exception."""
    return f"{type(error).__name__}: {str(error)[:300]}"


def measure(n: int, group: int, peers: dict[str, str]) -> dict:
    """One cell; `peers` are adapter files by name."""
    from triton.testing import do_bench

    def median(step: Callable[[], object]) -> float:
        return do_bench(step, warmup=20, rep=100, return_mode="median")

    core = draw(n, group, "cuda")
    grad = torch.randn_like(core.q)
    with torch.no_grad():
        out, lse = core.compressed()
        blocks = core.choose(lse)
        branches = out, core.selected(blocks), core.window()
        milliseconds = {
            "compressed": median(core.compressed),
            "choose": median(lambda: core.choose(lse)),
            "selected": median(lambda: core.selected(blocks)),
            "window": median(core.window),
            "gates": median(lambda: core.gated(branches)),
            "forward": median(core.forward),
        }
        memory = {"forward": extra_memory(core.forward, out.nbytes)}

    def full() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(core.q, core.k, core.v, is_causal=True, enable_gqa=True)

    milliseconds["forward + backward"] = median(lambda: forward_and_backward(core.forward, core.leaves, grad))
    with torch.no_grad():
        milliseconds["full forward"] = median(full)
    milliseconds["full forward + backward"] = median(lambda: forward_and_backward(full, core.leaves[:3], grad))
    failed, leaves = {}, (core.q, core.k, core.v, core.gates)
    for name, path in peers.items():
        try:
            step = partial(load_peer(path), *leaves)
            with torch.no_grad():
                milliseconds[f"{name} forward"] = median(step)
            milliseconds[f"{name} forward + backward"] = median(partial(forward_and_backward, step, leaves, grad))
        except Exception as error:  # noqa: BLE001 - a peer that does not compile or has no room
            failed[name] = failure(error)
    gradients = sum(x.nbytes for x in core.leaves)
    memory["forward + backward"] = extra_memory(lambda: forward_and_backward(core.forward, core.leaves, grad), gradients)
    return {"n": n, "group": group, "ms": milliseconds, "memory": memory, "errors": accuracy(core), "failed": failed}


def show(record: dict) -> None:
    """A line for the terminal."""
    parts = " ".join(f"{name} {value:.2f}" for name, value in record["ms"].items())
    errors = " ".join(f"{name} {value:.1e}" for name, value in record["errors"].items())
    memory = ", ".join(f"{value:.0f}" for value in record["memory"].values())
    print(f"{record['n'] // 1024}k G={record['group']}: {parts} | extra MiB {memory} | {errors}", *record["failed"].items(), flush=True)


def main() -> None:
    """Every length and group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072, 262144])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--out", type=Path, default=Path("core.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new cell after this")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="another implementation's adapter")
    arguments = parser.parse_args()
    start = time.monotonic()
    peers = dict(x.split("=", 1) for x in arguments.peer)
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    cells = []
    for n in arguments.lengths:
        for group in arguments.groups:
            if time.monotonic() - start > arguments.seconds:
                cells.append({"n": n, "group": group, "failed": "not reached"})
            else:
                try:
                    cells.append(measure(n, group, peers))
                    show(cells[-1])
                except Exception as error:  # noqa: BLE001 - no room at this length: the other cells go on
                    cells.append({"n": n, "group": group, "failed": failure(error)})
            if "ms" not in cells[-1]:
                print(f"{n // 1024}k G={group}: {cells[-1]['failed']}", flush=True)
            torch.cuda.empty_cache()
            arguments.out.write_text(json.dumps({**head, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
