"""Selected attention on one GPU: ours against full causal attention, FlexAttention and named peers.

    python benchmarks/selected.py [--quick] [--peer fsa=/path/to/adapter.py] [--out results.json]
    python benchmarks/selected.py --n 65536 --group 4 --selection random --seconds 120

Every cell first checks out and dQ of a few rows against float64, then takes medians of `triton.testing.do_bench`, all contenders
in one process on the same inputs. TFLOP/s count the listed blocks (5/2 as much in backward), the share of the floor is theirs of
what a matrix product reaches on the same device. Full attention does not depend on the selection: once for each length and
group. An exception in a contender is kept as its result. The last table, "ratios" in the file, holds the fastest peer's time
over ours (full attention and FlexAttention are no peers). A peer is a Python file with ``forward(q, k, v, indices, block_size,
scale) -> out``, causal and differentiable in q, k and v; shapes are ours: q (b, hq, n, d), k and v (b, hkv, n, d), indices
(b, hkv, n, t) int32, -1 none.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from fsa_compile.kernels.triton.selected_attention import selected_attention_backward, selected_attention_forward

KV_HEADS, HEAD_DIM = 4, 128
SELECTIONS = ("random", "correlated", "hot")
FLEX_LONGEST = 32768
"""FlexAttention needs a block mask per head and the dense (n, blocks) table it is made from: beyond this it is not tried."""


@dataclass(frozen=True)
class Cell:
    """One setting: n queries and keys, group size, block size, blocks per query, and how blocks are drawn."""

    n: int
    group: int
    block_size: int
    slots: int
    selection: str

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.n // 1024}k G={self.group} ({self.block_size},{self.slots}) {self.selection}"


class Ours(torch.autograd.Function):
    """The kernels of this package as a differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, indices, block_size, scale):
        out, lse = selected_attention_forward(q, k, v, indices, block_size, scale, "causal", 0, None)
        ctx.save_for_backward(q, k, v, out, lse, indices)
        ctx.constants = (block_size, scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, indices = ctx.saved_tensors
        grads = selected_attention_backward(dout, None, *tensors, indices, *ctx.constants, "causal", 0, None)
        return *grads, None, None, None


def full_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, scale: float) -> Tensor:
    """Causal attention over all keys: the yardstick, not the same result."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_contender(cell: Cell, indices: Tensor) -> Callable[..., Tensor]:
    """FlexAttention with a mask that reads the selection; its block mask is built once, outside the clock."""
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = -(-cell.n // cell.block_size)
    listed = torch.zeros(1, KV_HEADS, cell.n, blocks + 1, dtype=torch.bool, device=indices.device)
    listed.scatter_(3, torch.where(indices < 0, blocks, indices).long(), True)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & listed[b, h // cell.group, i, j // cell.block_size]

    mask = create_block_mask(seen, 1, KV_HEADS * cell.group, cell.n, cell.n, device=indices.device, _compile=True)

    def forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, scale: float) -> Tensor:
        return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)

    return forward


def select(cell: Cell, generator: torch.Generator) -> Tensor:
    """(1, KV_HEADS, n, slots) lists as NSA draws them: first, own and previous block forced; ascending, -1 last.

    "random": the rest uniform. "correlated": a score that changes smoothly over 32 queries. "hot": all queries list the first
    `slots` blocks.
    """
    n, t, device = cell.n, cell.slots, generator.device
    if cell.selection == "hot":
        return torch.arange(t, device=device, dtype=torch.int32).expand(1, KV_HEADS, n, t).contiguous()
    blocks = -(-n // cell.block_size)
    block = torch.arange(blocks, device=device)
    lists = torch.full((1, KV_HEADS, n, t), -1, dtype=torch.int32, device=device)
    for head in range(KV_HEADS):
        anchors = torch.rand(n // 32 + 2, blocks, generator=generator, device=device)
        for begin in range(0, n, 8192):
            query = torch.arange(begin, min(begin + 8192, n), device=device)
            if cell.selection == "correlated":
                part = (query % 32 / 32)[:, None]
                score = anchors[query // 32] * (1 - part) + anchors[query // 32 + 1] * part
            else:
                score = torch.rand(len(query), blocks, generator=generator, device=device)
            own = (query // cell.block_size)[:, None]
            score = score.masked_fill(block > own, -1.0).masked_fill((block == 0) | (block == own) | (block == own - 1), 2.0)
            value, chosen = score.topk(min(t, blocks), -1)
            chosen = torch.where(value < 0, blocks, chosen).sort(-1).values
            lists[0, head, query, : chosen.shape[-1]] = torch.where(chosen == blocks, -1, chosen).int()
    return lists


def row_errors(
    forward: Callable[..., Tensor], cell: Cell, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, dout: Tensor
) -> list[float]:
    """Relative error of out and dQ over a few rows, against float64."""
    leaf = q.detach().requires_grad_()
    scale = HEAD_DIM**-0.5
    out = forward(leaf, k, v, indices, cell.block_size, scale)
    (dq,) = torch.autograd.grad(out, leaf, dout)
    pairs: list[list[Tensor]] = [[], [], [], []]
    for i in (1, cell.block_size, cell.n // 3, cell.n - 1):
        for head in (0, q.shape[1] - 1):
            listed = indices[0, head // cell.group, i].long()
            inside = torch.arange(cell.block_size, device=q.device)
            keys = (listed[listed >= 0].unique()[:, None] * cell.block_size + inside).flatten()
            keys = keys[keys <= i]
            row = q[0, head, i].double().requires_grad_()
            want = ((k[0, head // cell.group, keys].double() @ row) * scale).softmax(0) @ v[0, head // cell.group, keys].double()
            (dwant,) = torch.autograd.grad(want, row, dout[0, head, i].double())
            for kept, x in zip(pairs, (out[0, head, i], want, dq[0, head, i], dwant)):
                kept.append(x.detach().double())
    got, want, dgot, dwant = (torch.stack(x) for x in pairs)
    return [((a - b).norm() / b.norm()).item() for a, b in ((got, want), (dgot, dwant))]


def time_contender(
    forward: Callable[..., Tensor], cell: Cell, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, dout: Tensor
) -> dict[str, float]:
    """Median milliseconds of forward and of backward alone, and MiB that each allocates beyond its results."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    scale = HEAD_DIM**-0.5

    def run() -> Tensor:
        return forward(*leaves, indices, cell.block_size, scale)

    def growth(call: Callable[[], object], results: int) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        del kept
        return max(0, torch.cuda.max_memory_allocated() - before - results) / 2**20

    with torch.no_grad():
        forward_ms = do_bench(run, warmup=10, rep=40, return_mode="median")
        forward_mib = growth(run, q.numel() * q.element_size() + q.numel() // HEAD_DIM * 4)
    out = run()

    def back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    backward_ms = do_bench(back, warmup=10, rep=40, return_mode="median")
    backward_mib = growth(back, sum(x.numel() * x.element_size() for x in (q, k, v)))
    return {"forward_ms": forward_ms, "backward_ms": backward_ms, "forward_mib": forward_mib, "backward_mib": backward_mib}


def load_peer(path: str) -> Callable[..., Tensor]:
    """The `forward` of a peer's adapter file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.forward


def cells(quick: bool, lengths: list[int], groups: list[int], selections: list[str]) -> Iterator[Cell]:
    """Every length, group and selection; `quick` leaves out 16k and most of 32k, 128k and of blocks of 128."""
    for n in lengths:
        for group in groups:
            for block_size, slots in ((64, 16), (128, 8)):
                for selection in selections:
                    main = n in (8192, 65536) and (block_size == 64 or selection == "random")
                    if not quick or main or (n >= 32768 and group in (1, 4) and block_size == 64 and selection == "random"):
                        yield Cell(n, group, block_size, slots, selection)


@functools.cache
def matmul_tflops() -> float:
    """What a large bfloat16 matrix product reaches here."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / do_bench(lambda: a @ b, warmup=20, rep=60, return_mode="median") / 1e9


def rates(cell: Cell, indices: Tensor, times: dict[str, float]) -> dict[str, float]:
    """TFLOP/s of both passes and their share of `matmul_tflops`."""
    listed = (indices >= 0).sum().item() * cell.group * cell.block_size
    flop = {"forward": 4 * listed * HEAD_DIM, "backward": 10 * listed * HEAD_DIM}
    reached = {name: x / times[f"{name}_ms"] / 1e9 for name, x in flop.items()}
    return {f"{name}_tflops": x for name, x in reached.items()} | {
        f"{name}_of_floor": x / matmul_tflops() for name, x in reached.items()
    }


def measure(cell: Cell, peers: dict[str, Callable[..., Tensor]], quick: bool) -> dict:
    """All contenders of one cell on the same inputs."""
    g = torch.Generator("cuda").manual_seed(0)
    heads = KV_HEADS * cell.group
    shapes = (heads, KV_HEADS, KV_HEADS, heads)
    # Memory as models have it, (b, n, h, d), seen as (b, h, n, d).
    q, k, v, dout = (
        torch.randn(1, cell.n, h, HEAD_DIM, generator=g, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in shapes
    )
    indices = select(cell, g)
    contenders: dict[str, Callable[..., Tensor]] = {"ours": Ours.apply, **peers}
    unmade: dict[str, dict[str, str]] = {}
    wanted = not quick  # it compiles for half a minute
    if wanted and cell.n <= FLEX_LONGEST and cell.selection == "random":
        try:
            contenders["flex"] = flex_contender(cell, indices)
        except Exception as error:  # noqa: BLE001
            unmade["flex"] = failure(error)
    record: dict = {**asdict(cell), "name": cell.name, "times": unmade, "errors": {}}
    for name, forward in contenders.items():
        try:
            record["errors"][name] = row_errors(forward, cell, q, k, v, indices, dout)
            times = time_contender(forward, cell, q, k, v, indices, dout)
            record["times"][name] = times | rates(cell, indices, times)
        except Exception as error:  # noqa: BLE001
            record["times"][name] = failure(error)
        torch.cuda.empty_cache()
    # 128k with 16 heads per group does not leave it room.
    if cell.selection == "random" and cell.block_size == 64 and cell.n * cell.group <= 65536 * 16:
        try:
            record["times"]["full"] = time_contender(full_attention, cell, q, k, v, indices, dout)
        except Exception as error:  # noqa: BLE001
            record["times"]["full"] = failure(error)
    record["ratios"] = ratios(record["times"], list(peers))
    return record


def failure(error: Exception) -> dict[str, str]:
    """What takes the place of times: a peer that does not compile or has no room must not end the run."""
    return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def ratios(times: dict[str, dict], peers: list[str]) -> dict[str, dict]:
    """For forward and for forward + backward: the fastest peer, and its time over ours. Empty where either is missing."""
    found = {}
    for name, parts in (("forward", ("forward_ms",)), ("forward + backward", ("forward_ms", "backward_ms"))):
        total = {x: sum(times[x][p] for p in parts) for x in ("ours", *peers) if "failed" not in times[x]}
        mine = total.pop("ours", None)
        if mine and total:
            best = min(total, key=total.__getitem__)
            found[name] = {"peer": best, "ratio": total[best] / mine}
    return found


def show(record: dict) -> None:
    """One line per contender."""
    for name, x in record["times"].items():
        if "failed" in x:
            print(f"{record['name']:34s} {name:6s} {x['failed']}", flush=True)
            continue
        wrong = "".join(f" {e:.1e}" for e in record["errors"].get(name, []))
        print(
            f"{record['name']:34s} {name:6s} {x['forward_ms']:8.3f} {x['backward_ms']:8.3f} ms "
            f"{x['forward_mib']:7.0f} {x['backward_mib']:7.0f} MiB "
            f"{x.get('forward_tflops', 0):4.0f} {x.get('backward_tflops', 0):4.0f} TFLOP/s{'   errors' + wrong if wrong else ''}",
            flush=True,
        )


def summary(records: list[dict]) -> None:
    """The fastest peer's time over ours, cell by cell."""
    print(f"\n{'fastest peer / ours':34s} {'forward':>16s} {'forward + backward':>20s}")
    for record in records:
        shown = [f"{x['ratio']:.2f} {x['peer']}" for x in record["ratios"].values()]
        if shown:
            print(f"{record['name']:34s} {shown[0]:>16s} {shown[1]:>20s}")


def plot(records: list[dict], path: Path) -> None:
    """Milliseconds of forward + backward against the length, one panel per group, of random blocks of 64."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    kept = [x for x in records if x["selection"] == "random" and x["block_size"] == 64]
    groups = sorted({x["group"] for x in kept})
    if not groups:
        return
    figure, panels = pyplot.subplots(1, len(groups), figsize=(4 * len(groups), 4), sharey=True, squeeze=False)
    for panel, group in zip(panels[0], groups):
        lines: dict[str, list[tuple[int, float]]] = {}
        for record in (x for x in kept if x["group"] == group):
            for name, x in record["times"].items():
                if "failed" not in x:
                    lines.setdefault(name, []).append((record["n"], x["forward_ms"] + x["backward_ms"]))
        for name, points in lines.items():
            panel.loglog(*zip(*points), marker="o", label=name)
        panel.set(title=f"G = {group}", xlabel="length", ylabel="forward + backward, ms")
        panel.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cells, no FlexAttention: a minute")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="another implementation's adapter")
    parser.add_argument("--n", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072], help="lengths")
    parser.add_argument("--group", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="query heads per key/value head")
    parser.add_argument("--selection", nargs="+", default=SELECTIONS, choices=SELECTIONS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new cell after this")
    parser.add_argument("--commit", help="what to record where there is no git checkout to ask")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default benchmarks/results/selected-DATE.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/selected.py needs a CUDA device.")
    start = time.monotonic()
    peers, unloaded = {}, {}
    for name, path in (x.split("=", 1) for x in args.peer):
        try:
            peers[name] = load_peer(path)
        except Exception as error:  # noqa: BLE001
            unloaded[name] = failure(error)["failed"]
            print(f"peer {name} {unloaded[name]}")
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    commit = args.commit or (git.stdout.strip() if git.returncode == 0 else "unknown")
    header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
              "commit": commit, "matmul_tflops": matmul_tflops(),
              "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16", "peers": list(peers),
              "peers_not_loaded": unloaded}  # fmt: skip
    print(*(f"{key}: {value}" for key, value in header.items()), sep="\n")
    print(f"{'cell':34s} {'':6s}  forward backward    scratch forward backward", flush=True)
    out = args.out or here / "results" / f"selected-{time.strftime('%Y-%m-%d')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    records, skipped = [], []
    for cell in cells(args.quick, args.n, args.group, args.selection):
        if time.monotonic() - start > args.seconds:
            skipped.append(cell.name)
            continue
        try:
            records.append(measure(cell, peers, args.quick))
        except Exception as error:  # noqa: BLE001 - no room for the inputs, or a peer left the device unusable
            records.append({**asdict(cell), "name": cell.name, "times": {"all": failure(error)}, "errors": {}, "ratios": {}})
        show(records[-1])
        out.write_text(json.dumps({**header, "cells": records}, indent=1))
    out.write_text(json.dumps({**header, "cells": records, "not_reached": skipped}, indent=1))
    summary(records)
    if skipped:
        print(f"{len(skipped)} cells not reached in {args.seconds:.0f} s: {', '.join(skipped)}")
    plot(records, out.with_suffix(".png"))
    print(out)


if __name__ == "__main__":
    main()
