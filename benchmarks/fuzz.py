"""The long fuzzing run: thousands of generated models and a mutant of each, judged as in tests/fuzz.

    python benchmarks/fuzz.py --count 5000 --seed 0 --jobs 2

Model number i is drawn from seed + i, so a run can be cut into pieces and repeated. The result is a JSON file with the counts
and with the decisions of every model that failed; ``--replay FILE`` prints these models, ``--shrink`` makes them plain first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def one(seed: int) -> dict[str, Any]:
    """Judge the model of a seed and one mutant of it."""
    from fuzz.choices import at_random
    from fuzz.judge import judge, judge_mutant
    from fuzz.model import generate

    start = time.perf_counter()
    model = generate(at_random(seed))
    slip = random.Random(seed).choice(model.slips)
    record: dict[str, Any] = {"seed": seed, "sites": len(model.branches), "slip": slip.partition(".")[2] or slip}
    for name, judgement in (("model", judge(model)), ("mutant", judge_mutant(model, slip))):
        verdict = judgement.verdict
        record[name] = {
            "fault": judgement.fault,
            "rewritten": verdict.rewritten if verdict else 0,
            "owed": len(judgement.owed),
            "error": verdict.error if verdict else None,
        }
        if judgement.fault:
            record[name] |= {"detail": judgement.detail[:2000], "trail": dict(model.trail), "slip": judgement.model.mutant}
    record["seconds"] = time.perf_counter() - start
    return record


def start_worker(niceness: int) -> None:
    os.nice(niceness)
    import torch

    torch.set_num_threads(1)


def summary(records: list[dict[str, Any]], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The numbers of a run."""
    import torch

    models, mutants = [r["model"] for r in records], [r["mutant"] for r in records]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "seed": arguments.seed,
        "asked": arguments.count,
        "models": len(models),
        "mutants": len(mutants),
        "sites": sum(r["sites"] for r in records),
        "rewritten": sum(m["rewritten"] for m in models),
        "refused_as_listed": sum(r["sites"] - r["model"]["rewritten"] for r in records if not r["model"]["fault"]),
        "mutants_rewritten": sum(m["rewritten"] > 0 for m in mutants),
        "model_faults": Counter(m["fault"] for m in models if m["fault"]),
        "mutant_faults": Counter(m["fault"] for m in mutants if m["fault"]),
        "slips": Counter(r["slip"] for r in records),
        "seconds": round(seconds, 1),
        "seconds_per_model": round(sum(r["seconds"] for r in records) / max(1, len(records)), 2),
        "jobs": arguments.jobs,
        "failures": [r for r in records if r["model"]["fault"] or r["mutant"]["fault"]],
    }


def replay(path: Path, shrunk: bool) -> None:
    """Print the models that failed in a run."""
    from fuzz.choices import from_trail
    from fuzz.judge import judge, judge_mutant
    from fuzz.model import generate, Model
    from fuzz.shrink import shrink

    for record in json.loads(path.read_text())["failures"]:
        for kind in ("model", "mutant"):
            failure = record[kind]
            if not failure["fault"]:
                continue
            mutant = failure["slip"]

            def fails(model: Model, mutant: str | None = mutant, fault: str = failure["fault"]) -> bool:
                parent = generate(from_trail(model.trail))
                return (judge_mutant(parent, mutant) if mutant else judge(parent)).fault == fault

            model = generate(from_trail(failure["trail"]), mutant)
            if shrunk:
                model = shrink(failure["trail"], fails, mutant)
            print(f"seed {record['seed']}: {failure['fault']}: {failure['detail']}\n{model!r}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="number of models")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first one")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--nice", type=int, default=19, help="priority of the processes, 19 is the lowest")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, with what there is")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/fuzz-<models>.json)")
    parser.add_argument("--replay", type=Path, help="print the failures of an earlier run instead")
    parser.add_argument("--shrink", action="store_true", help="with --replay: make them plain first")
    arguments = parser.parse_args()
    if arguments.replay:
        replay(arguments.replay, arguments.shrink)
        return

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    records: list[dict[str, Any]] = []
    start = time.perf_counter()
    # A worker starts afresh now and then, because compiled code and source texts pile up.
    pool = multiprocessing.get_context("spawn").Pool(
        arguments.jobs, start_worker, (arguments.nice,), maxtasksperchild=100
    )
    with pool:
        for record in pool.imap_unordered(one, range(arguments.seed, arguments.seed + arguments.count)):
            records.append(record)
            for kind in ("model", "mutant"):
                if record[kind]["fault"]:
                    print(f"seed {record['seed']}: {kind} {record[kind]['fault']}: {record[kind]['detail'][:300]}", flush=True)
            elapsed = time.perf_counter() - start
            if len(records) % 50 == 0:
                print(f"{len(records)} of {arguments.count} in {elapsed:.0f} s", flush=True)
            if elapsed > 60 * arguments.minutes:
                pool.terminate()
                break
    records.sort(key=lambda record: record["seed"])
    result = summary(records, arguments, time.perf_counter() - start)
    output = arguments.output or ROOT / "benchmarks" / "results" / f"fuzz-{len(records)}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "failures"}, indent=1))


if __name__ == "__main__":
    main()
