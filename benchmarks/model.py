"""A whole dense-mask NSA layer on a GPU: eager, Inductor and fsa, time and peak memory.

    python benchmarks/model.py                     # N = 2k to 32k
    python benchmarks/model.py --n 4096 8192

bfloat16, dim 1024, 16 query and 4 key/value heads of 64, block 64, top-k 16, window 512: the layer of ``examples/dense_nsa.py``. All
modes run in one process, medians of `triton.testing.do_bench`; peak memory is what a step adds to the loaded model. A mode
that runs out of memory is reported as such. The result goes to ``benchmarks/results/model_<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from dense_nsa import DenseNSA  # noqa: E402

MODES = ("eager", "inductor", "fsa")


def step(function, model, x, backward):
    """One forward, or forward and backward, as a callable."""
    if not backward:

        def forward():
            with torch.no_grad():
                function(x)

        return forward

    def both():
        torch.autograd.grad(function(x).sum(), list(model.parameters()))

    return both


def measure(mode: str, n: int) -> dict:
    """Milliseconds and peak GiB of one mode at one length."""
    import triton

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DenseNSA(dim=1024, heads=16, kv_heads=4, dim_head=64, block=64, topk=16, window=512).cuda().bfloat16()
    x = torch.randn(1, n, 1024, device="cuda", dtype=torch.bfloat16)
    row: dict = {"mode": mode, "n": n}
    function = model if mode == "eager" else torch.compile(model, backend=mode, fullgraph=True)
    for name, backward in (("forward", False), ("forward+backward", True)):
        try:
            run = step(function, model, x, backward)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            row[f"{name} first call s"] = round(time.perf_counter() - start, 2)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            row[f"{name} GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
            row[f"{name} ms"] = round(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median"), 3)
        except torch.cuda.OutOfMemoryError:
            row[name] = "out of memory"
        torch.cuda.empty_cache()
    if mode == "fsa":
        import fsa_compile

        report = fsa_compile.last_report()
        row["rewritten"] = report.rewritten
        row["analysis s"] = [dict(g.seconds) for g in report.graphs]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result: dict = {"device": device, "torch": torch.__version__, "commit": git.stdout.strip() or "unknown", "rows": []}
    out = args.out or ROOT / "benchmarks/results" / f"model_{device.replace(' ', '_')}.json"
    print(f"{device}, torch {torch.__version__}\n{'n':>6} {'mode':9} {'fwd ms':>9} {'f+b ms':>9} {'fwd GiB':>8} {'f+b GiB':>8}")
    for n in args.n:
        for mode in args.modes:
            row = measure(mode, n)
            result["rows"].append(row)
            out.write_text(json.dumps(result, indent=1) + "\n")  # after each row: a run that is cut short keeps what it has
            cells = [str(row.get(f"{k} {u}", "-")) for u in ("ms", "GiB") for k in ("forward", "forward+backward")]
            print(f"{n:6} {mode:9} {cells[0]:>9} {cells[1]:>9} {cells[2]:>8} {cells[3]:>8}", flush=True)


if __name__ == "__main__":
    main()
