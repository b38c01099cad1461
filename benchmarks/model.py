"""Whole sparse attention layers on a GPU: eager, Inductor and fsa, time and peak memory.

    python benchmarks/model.py                                             # all layers, N = 2k to 32k
    python benchmarks/model.py --models dense --n 4096 8192 --seconds 300

bfloat16, one sequence, unmodified models:

* ``dense``: ``examples/dense_nsa.py``, dim 1024, 16 query and 4 key/value heads of 64, block 64, top-k 16, window 512;
* ``lucidrains``: `SparseAttention` of native-sparse-attention-pytorch, causal, the same sizes;
* ``minimax-eager`` and ``minimax-sdpa``: a block-sparse layer of transformers' MiniMax-M3, dim 2048, 16 and 4 heads of 128, blocks
  of 128, top-k 16, its causal mask made inside. ``minimax`` stands for both.

All run in one process, medians of `triton.testing.do_bench`; peak memory is what a step adds to the loaded model; the first call
compiles. An exception is kept as the result, and what had no memory is not tried at larger N. ``selection`` says for each site
that was rewritten to selected attention whether scoring and top-k were ``fused`` or ``kept``. The result goes to
``benchmarks/results/model_<device>.json``, written again after each row. ``--device cpu`` is for trying the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from dense_nsa import DenseNSA

MODES = ("eager", "inductor", "fsa")
PASSES = ("forward", "forward+backward")
MINIMAX_DIM = 2048


class MiniMaxLayer(nn.Module):
    """MiniMax-M3's sparse attention for `n` tokens from position 0: (1, n, 2048) to (1, n, 2048).

    Args:
        n: Tokens.
        implementation: ``"eager"`` or ``"sdpa"``.
    """

    def __init__(self, n: int, implementation: str) -> None:
        super().__init__()
        from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl, modeling_minimax_m3_vl

        config = configuration_minimax_m3_vl.MiniMaxM3VLTextConfig(
            hidden_size=MINIMAX_DIM, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
            index_n_heads=4, index_head_dim=128, index_block_size=128, index_topk_blocks=16, index_local_blocks=1,
            layer_types=["minimax_m3_sparse"], max_position_embeddings=1 << 20,
        )  # fmt: skip
        config._attn_implementation = implementation
        self.attention = modeling_minimax_m3_vl.MiniMaxM3VLAttention(config, 0)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.register_buffer("position", torch.arange(n)[None])
        cos, sin = modeling_minimax_m3_vl.MiniMaxM3VLRotaryEmbedding(config)(torch.zeros(1, n, MINIMAX_DIM), self.position)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        """Causal."""
        i = torch.arange(x.shape[1], device=x.device)
        low = torch.finfo(x.dtype).min
        mask = torch.zeros(len(i), len(i), device=x.device, dtype=x.dtype).masked_fill(i[None] > i[:, None], low)
        return self.attention(x, (self.cos, self.sin), mask[None, None], position_ids=self.position)[0]


def dense(n: int) -> tuple[nn.Module, int]:
    """The example's layer and its width."""
    return DenseNSA(dim=1024, heads=16, kv_heads=4, dim_head=64, block=64, topk=16, window=512), 1024


def lucidrains(n: int) -> tuple[nn.Module, int]:
    """The layer of PyPI and its width; it counts the query's own block apart, hence 15."""
    from native_sparse_attention_pytorch import SparseAttention

    return SparseAttention(
        dim=1024, dim_head=64, heads=16, kv_heads=4, causal=True, sliding_window_size=512, compress_block_size=32,
        compress_block_sliding_stride=16, selection_block_size=64, num_selected_blocks=15,
    ), 1024  # fmt: skip


def minimax(n: int, implementation: str) -> tuple[nn.Module, int]:
    """The layer of transformers and its width."""
    return MiniMaxLayer(n, implementation), MINIMAX_DIM


MODELS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "dense": dense,
    "lucidrains": lucidrains,
    "minimax-eager": partial(minimax, implementation="eager"),
    "minimax-sdpa": partial(minimax, implementation="sdpa"),
}


def step(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    """One forward, or forward and backward, as a callable."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function(x)

        return forward

    leaves = [p for p in model.parameters() if p.requires_grad]

    def both() -> None:
        torch.autograd.grad(function(x).sum(), leaves, allow_unused=True)

    return both


def timed(run: Callable[[], None], device: str) -> dict[str, float]:
    """Seconds of the first call, then its GiB (of a GPU) and median milliseconds."""
    cuda = device == "cuda"
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    found = {"first call s": round(time.perf_counter() - start, 2)}
    if cuda:
        import triton

        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found["GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
        return found | {"ms": round(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median"), 3)}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return found | {"ms": round(statistics.median(times) * 1e3, 3)}


def free(device: str) -> None:
    """Give back what earlier steps held: an exception's frames keep tensors alive until collected."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def report() -> dict:
    """What fsa did in its last compilation."""
    import fsa_compile

    last = fsa_compile.last_report()
    return {
        "rewritten": last.rewritten,
        "sites": [[s.role, str(s.verdict), str(s.reason) if s.reason else None] for s in last.sites],
        "selection": [
            "fused" if s.selection.fused else f"kept: {s.selection.reason}" for s in last.sites if s.selection is not None
        ],
        "analysis s": [dict(g.seconds) for g in last.graphs],
        "notes": list(last.notes),
    }


def measure(name: str, mode: str, n: int, passes: list[str], device: str) -> dict:
    """One model and mode at one length: ``"PASS ms"``, ``"PASS GiB"``, ``"PASS first call s"``, or ``PASS`` with what failed."""
    row: dict = {"model": name, "mode": mode, "n": n}
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        model, dim = MODELS[name](n)
        model = model.to(device, torch.bfloat16)
        x = torch.randn(1, n, dim, device=device, dtype=torch.bfloat16)
    except Exception as error:  # noqa: BLE001 - a package that is not installed, no memory for the model
        return row | dict.fromkeys(passes, failure(error))
    # A graph break is a result of the models that are not ours.
    function = model if mode == "eager" else torch.compile(model, backend=mode, fullgraph=name == "dense")
    for kind in passes:
        try:
            found = timed(step(function, model, x, kind != "forward"), device)
            row |= {f"{kind} {key}": value for key, value in found.items()}
        except Exception as error:  # noqa: BLE001 - the other modes and lengths go on
            row[kind] = failure(error)
        free(device)
        if mode == "fsa":
            row |= report()
    return row


def failure(error: Exception) -> str:
    """``"out of memory"``, or the exception."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    return f"{type(error).__name__}: {str(error)[:500]}"


def show(row: dict) -> None:
    """A line for the terminal."""
    cells = [str(row.get(f"{kind} {unit}", "-")) for unit in ("ms", "GiB", "first call s") for kind in PASSES]
    failed = [f"{kind}: {row[kind][:100]}" for kind in PASSES if kind in row]
    selection = [x.partition(":")[0] for x in row.get("selection", [])]
    print(
        f"{row['model']:13} {row['n']:6} {row['mode']:9}" + "".join(f" {x:>9}" for x in cells), *selection, *failed, flush=True
    )


def ratios(rows: list[dict]) -> list[dict]:
    """Inductor's over fsa's milliseconds and GiB, of each model and length."""
    by_cell = {(row["model"], row["n"], row["mode"]): row for row in rows}
    found = []
    for (name, n, mode), row in by_cell.items():
        other = by_cell.get((name, n, "inductor"))
        if mode == "fsa" and other:
            keys = [f"{kind} {unit}" for unit in ("ms", "GiB") for kind in PASSES]
            shared = {key: round(other[key] / row[key], 2) for key in keys if key in other and row.get(key)}
            found.append({"model": name, "n": n, **shared})
    return found


def main() -> None:
    """Every length, model and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--models", nargs="+", default=["dense", "lucidrains", "minimax"], choices=[*MODELS, "minimax"])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--no-backward", action="store_true", help="forward only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new row after this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--commit", help="what to record where there is no git checkout to ask")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    start = time.monotonic()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    commit = args.commit or git.stdout.strip() or "unknown"
    result: dict = {"device": device, "torch": torch.__version__, "commit": commit, "rows": [], "not_reached": []}
    out = args.out or ROOT / "benchmarks/results" / f"model_{device.replace(' ', '_')}.json"
    head = [f"{kind} {unit}" for unit in ("ms", "GiB", "1st s") for kind in ("fwd", "f+b")]
    print(f"{device}, torch {torch.__version__}\n{'model':13} {'n':>6} {'mode':9}" + "".join(f" {x:>9}" for x in head))
    models = [y for x in args.models for y in (("minimax-eager", "minimax-sdpa") if x == "minimax" else (x,))]
    full: set[tuple[str, str, str]] = set()  # had no memory
    for n in sorted(args.n):
        for name in models:
            for mode in args.modes:
                passes = [kind for kind in PASSES[: 1 if args.no_backward else 2] if (name, mode, kind) not in full]
                if time.monotonic() - start > args.seconds:
                    result["not_reached"].append([name, mode, n])
                elif passes:
                    row = measure(name, mode, n, passes, args.device)
                    free(args.device)
                    full |= {(name, mode, kind) for kind in passes if row.get(kind) == "out of memory"}
                    result["rows"].append(row)
                    show(row)
                result["ratios"] = ratios(result["rows"])
                out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'inductor / fsa':13} {'n':>6}" + "".join(f" {x:>9}" for x in head[:4]))
    for x in result["ratios"]:
        cells = [str(x.get(f"{kind} {unit}", "-")) for unit in ("ms", "GiB") for kind in PASSES]
        print(f"{x['model']:13} {x['n']:6}" + "".join(f" {cell:>9}" for cell in cells))
    if result["not_reached"]:
        print(f"not reached in {args.seconds:.0f} s:", *(f"{name} {mode} {n};" for name, mode, n in result["not_reached"]))


if __name__ == "__main__":
    main()
