"""The dense-mask NSA layer on a CPU: eager, Inductor, and fsa with Inductor behind it.

    python benchmarks/cpu.py                       # N = 8192; eager needs about 12 GB and minutes
    python benchmarks/cpu.py --n 2048 --output -   # a quick run that is printed and not kept

Measured, for forward alone (no gradients) and forward + backward, each (mode, pass) in a process of its own with empty compile
caches:

* ``median_ms``: median time of a pass once everything is compiled; of one pass for eager.
* ``peak_mib``: growth of the resident set over the loaded model, from before the first pass to the end. What the compiler needs
  inside of the process is in it.
* ``compile_s``: time inside of Inductor (own timer around its call, and what the first backward takes beyond a median pass).
* ``analysis_s``: for fsa, all that its backend does besides calling Inductor, first imports included; the report's own account of
  its stages is ``stages_s``. The ratios compare ``analysis_s`` with the ``compile_s`` of Inductor without fsa.
* ``difference``: largest norm-wise difference from eager over the output and all gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = {"dim": 256, "heads": 8, "kv_heads": 2, "dim_head": 64, "block": 64, "topk": 16, "window": 512}
_compile_fx = compile_fx.compile_fx

MODES = ("eager", "inductor", "fsa")
PASSES = ("forward", "forward+backward")


def dense_nsa() -> nn.Module:
    """The layer of `examples/dense_nsa.py`, weights from a fixed seed."""
    spec = importlib.util.spec_from_file_location("dense_nsa", ROOT / "examples" / "dense_nsa.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo imports the modules whose globals it reads
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.DenseNSA(**CONFIGURATION)


class Timed:
    """A `torch.compile` backend, Inductor or fsa, that adds up the seconds that Inductor takes and those it does not.

    Args:
        mode: ``"inductor"`` or ``"fsa"``.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.total = self.inductor = 0.0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        with mock.patch.object(compile_fx, "compile_fx", self._compile_fx):
            compiled = torch._dynamo.lookup_backend(self.mode)(gm, list(example_inputs))
        self.total += time.perf_counter() - start
        return compiled

    def _compile_fx(self, *arguments: Any, **keywords: Any) -> Any:
        # compile_fx calls itself to apply settings: unpatched inside of itself, it is counted once.
        start = time.perf_counter()
        with mock.patch.object(compile_fx, "compile_fx", _compile_fx):
            compiled = _compile_fx(*arguments, **keywords)
        self.inductor += time.perf_counter() - start
        return compiled


def resident_mib() -> float:
    """The resident set now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(mode: str, kind: str, n: int, repeats: int, tensors: Path) -> dict[str, Any]:
    """One mode and pass in this process; see the module's docstring for what is returned. Writes results to `tensors`."""
    model = dense_nsa()
    x = torch.randn(1, n, CONFIGURATION["dim"], generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    backend = Timed(mode)
    run: Callable[[Tensor], Tensor] = model if mode == "eager" else torch.compile(model, backend=backend, fullgraph=True)
    backward = kind == "forward+backward"

    def step() -> tuple[float, float, list[Tensor]]:
        """Seconds of the forward, of the backward, and the tensors."""
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = run(x)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(out, list(model.parameters()), upstream) if backward else ()
        return middle - start, time.perf_counter() - middle, [out.detach(), *gradients]

    loaded = resident_mib()
    _, first_backward, results = step()
    torch.save(results, tensors)
    del results
    timed = [step()[:2] for _ in range(repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row: dict[str, Any] = {
        "mode": mode, "pass": kind,
        "median_ms": 1e3 * statistics.median(f + b for f, b in timed),
        "peak_mib": peak - loaded,
    }  # fmt: skip
    if mode != "eager":
        # The backward graph is compiled when it is first needed, inside of the first backward pass.
        row["compile_s"] = backend.inductor + max(0.0, first_backward - statistics.median(b for _, b in timed))
    if mode == "fsa":
        import fsa_compile

        report = fsa_compile.last_report()
        row["analysis_s"] = backend.total - backend.inductor
        row["stages_s"] = {stage: seconds for graph in report.graphs for stage, seconds in graph.seconds.items()}
        row["rewritten"] = sorted(site.role for site in report.sites if site.verdict == "rewritten")
    return row


def in_fresh_process(mode: str, kind: str, n: int, repeats: int, tensors: Path) -> dict[str, Any]:
    """`measure` in a process of its own, without compiled code from earlier runs."""
    command = [sys.executable, __file__, "--n", str(n), "--repeats", str(repeats), "--measure", mode, kind, str(tensors)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def difference(a: Path, b: Path) -> float:
    """The largest norm-wise difference of two lists of tensors."""
    pairs = zip(torch.load(a), torch.load(b), strict=True)
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each pass: how fsa compares with eager and with Inductor."""
    found: dict[str, dict[str, float]] = {}
    for kind in PASSES:
        by = {row["mode"]: row for row in rows if row["pass"] == kind}
        found[kind] = {
            f"{name} over {other}": by[a][key] / by[b][key]
            for other in ("eager", "inductor")
            for name, key, a, b in (("speed", "median_ms", other, "fsa"), ("memory", "peak_mib", "fsa", other))
        }
        found[kind]["analysis over inductor's compile time"] = by["fsa"]["analysis_s"] / by["inductor"]["compile_s"]
    return found


def device() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout, with ``-dirty`` if the package or the model differ from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "fsa_compile", "examples", "benchmarks/cpu.py")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="tokens (default: 8192)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, of which the median counts (default: 5)")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "cpu.json"), help="JSON file, - for none")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        mode, kind, tensors = arguments.measure
        print(json.dumps(measure(mode, kind, arguments.n, arguments.repeats, Path(tensors))))
        return

    facts = {
        "device": device(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "dtype": "float32", "batch": 1, "n": arguments.n,
        "layer": CONFIGURATION, "load_before": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(facts, indent=1), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in PASSES:
            for mode in MODES:
                tensors = Path(folder) / f"{mode}.pt"
                repeats = 1 if mode == "eager" else arguments.repeats  # eager is what outputs are compared with; it takes minutes
                row = in_fresh_process(mode, kind, arguments.n, repeats, tensors)
                row["difference"] = difference(tensors, Path(folder) / "eager.pt")
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {**facts, "load_after": os.getloadavg()[0], "rows": rows, "ratios": ratios(rows)}
    print(json.dumps(result["ratios"], indent=1))
    if arguments.output != "-":
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
