"""The long fuzzing run: thousands of generated models and a mutant of each, judged as in tests/fuzz.

    python benchmarks/fuzz.py --seed 0 --count 5000 --jobs 14 --seconds 540 --out piece0.jsonl   # again, and it goes on
    python benchmarks/fuzz.py --merge piece*.jsonl                                               # benchmarks/results/fuzz-5000.json
    python benchmarks/fuzz.py --replay piece0.jsonl --shrink                                     # what failed, made plain
    python benchmarks/fuzz.py --replay "{'branches': 'window'}" --slip window.values             # one model, by its trail

Model number i is drawn from seed i. A piece is a text file with one JSON object a line: first what ran (commit, torch), then the
record of each model as it is judged, so a run that is cut off loses nothing but the models in flight, and a second call with the
same file goes on where the first one stopped. A model that takes longer than ``--limit`` seconds, or whose process dies, is a
fault like any other.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Record = dict[str, Any]

MODELS_PER_PROCESS = 200
"""A worker starts afresh now and then, because compiled code and source texts pile up."""

LAST_SECONDS = 20
"""How long models that are in flight when the time is up may still take. What is cut off has no record; a resumed run does it."""

KINDS = ("model", "mutant")


def one(seed: int) -> Record:
    """Judge the model of a seed and one mutant of it."""
    from fuzz.judge import judge, judge_mutant

    start = time.perf_counter()
    model, slip = drawn(seed)
    record = told(seed, model, slip)
    for kind, judgement in (("model", judge(model)), ("mutant", judge_mutant(model, slip))):
        verdict = judgement.verdict
        record[kind] = {"fault": judgement.fault, "rewritten": list(verdict.roles) if verdict else []}
        if verdict:
            record[kind]["error"] = verdict.error
        if kind == "model" and verdict:
            record[kind]["owed"] = list(judgement.owed)
            record[kind]["reasons"] = list(verdict.reasons)
        if judgement.fault:
            detail = judgement.detail[-2000:] if judgement.fault == "crash" else judgement.detail[:2000]
            record[kind] |= {"detail": detail, "trail": dict(model.trail), "mutant": judgement.model.mutant}
    record["seconds"] = round(time.perf_counter() - start, 2)
    return record


def drawn(seed: int) -> tuple[Any, str]:
    """The model of a seed and the name of its mutant."""
    from fuzz.choices import at_random
    from fuzz.model import generate

    model = generate(at_random(seed))
    return model, random.Random(seed).choice(model.slips)


def told(seed: int, model: Any, slip: str) -> Record:
    """What is known before anything runs; the name of the slip without its branch."""
    return {"seed": seed, "branches": list(model.branches), "dtype": model.dtype, "slip": slip.partition(".")[2] or slip}


def lost(seed: int, fault: str, detail: str) -> Record:
    """The record of a model that gave no answer."""
    model, slip = drawn(seed)
    failure = {"fault": fault, "rewritten": [], "detail": detail, "trail": dict(model.trail), "mutant": None}
    return told(seed, model, slip) | {"model": failure, "mutant": failure | {"mutant": slip}, "seconds": 0.0}


def work(tasks: Connection, niceness: int) -> None:
    """A process: seeds come in, records go out, None ends it."""
    os.nice(niceness)
    import torch

    torch.set_num_threads(1)
    while (seed := tasks.recv()) is not None:
        tasks.send(one(seed))


class Worker:
    """One process with at most one model in hand."""

    def __init__(self, context: Any, niceness: int) -> None:
        self.answers, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, niceness), daemon=True)
        self.process.start()
        theirs.close()
        self.judged = 0
        self.seed: int | None = None
        self.since = 0.0

    def give(self, seed: int) -> None:
        self.seed, self.since = seed, time.perf_counter()
        self.answers.send(seed)

    def take(self) -> Record:
        """The record that the process has ready, or what is to be said of a process that died."""
        seed, self.seed = self.seed, None
        assert seed is not None
        self.judged += 1
        try:
            return self.answers.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            self.judged = MODELS_PER_PROCESS
            return lost(seed, "died", f"the process ended with code {self.process.exitcode}")

    def overdue(self, limit: float) -> bool:
        # The first model pays for the imports, too.
        return self.seed is not None and time.perf_counter() - self.since > limit + (60 if self.judged == 0 else 0)

    def stop(self) -> None:
        """End the process, by force if it has a model in hand or is dead already."""
        if self.seed is None and self.process.is_alive():
            self.answers.send(None)
            self.process.join(5)
        self.process.kill()
        self.process.join()
        self.answers.close()


def judge_all(seeds: Iterator[int], jobs: int, niceness: int, limit: float, seconds: float) -> Iterator[Record]:
    """Records of `seeds` in the order in which they are ready; after `seconds` no model is begun."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    workers: list[Worker] = []
    try:
        while True:
            late = time.perf_counter() - start - seconds
            while late < 0 and len(workers) < jobs and (seed := next(seeds, None)) is not None:
                workers.append(Worker(context, niceness))
                workers[-1].give(seed)
            if not workers or late > LAST_SECONDS:
                return
            wait([worker.answers for worker in workers], timeout=1.0)
            for worker in list(workers):
                if worker.answers.poll():
                    yield worker.take()
                elif worker.overdue(limit):
                    assert worker.seed is not None
                    yield lost(worker.seed, "timeout", f"no answer after {limit:.0f} s")
                    worker.judged = MODELS_PER_PROCESS
                else:
                    continue
                in_time = time.perf_counter() - start < seconds
                if in_time and worker.judged < MODELS_PER_PROCESS and (seed := next(seeds, None)) is not None:
                    worker.give(seed)
                else:
                    workers.remove(worker)
                    worker.stop()
    finally:
        for worker in workers:
            worker.stop()


@dataclass(frozen=True)
class Piece:
    """A file of records.

    Args:
        header: What ran.
        records: The models judged so far, by seed.
    """

    header: dict[str, Any]
    records: dict[int, Record]

    @classmethod
    def read(cls, path: Path) -> Piece:
        """The records of a file; a last line that was cut off is left out."""
        lines = path.read_text().splitlines()
        records = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                if number != len(lines):
                    raise
                continue
            records[record["seed"]] = record
        return cls(json.loads(lines[0]), records)


def environment(commit: str | None) -> dict[str, Any]:
    """What runs. The commit is asked of git where nobody says it; "+" stands for changes beside it."""
    import torch

    if commit is None:
        try:
            commit = _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--", "fsa_compile", "tests/fuzz") else "")
        except (OSError, subprocess.CalledProcessError):
            commit = "unknown"
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version()}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run(arguments: argparse.Namespace) -> None:
    """Judge what the piece does not hold yet."""
    out: Path = arguments.out
    header = environment(arguments.commit)
    done: dict[int, Record] = {}
    if out.exists() and out.stat().st_size:
        piece = Piece.read(out)
        if piece.header != header:
            raise SystemExit(f"{out} is of {piece.header}, this is {header}: give another file")
        done = piece.records
        # A line that was cut off must not swallow the next one.
        out.write_text("".join(json.dumps(line) + "\n" for line in (header, *done.values())))
    else:
        out.write_text(json.dumps(header) + "\n")
    seeds = [seed for seed in range(arguments.seed, arguments.seed + arguments.count) if seed not in done]
    print(f"{len(seeds)} models to judge, {arguments.count - len(seeds)} in {out} already", flush=True)
    start = time.perf_counter()
    count = 0
    with out.open("a") as file:
        for record in judge_all(iter(seeds), arguments.jobs, arguments.nice, arguments.limit, arguments.seconds):
            file.write(json.dumps(record) + "\n")
            file.flush()
            count += 1
            for kind in KINDS:
                if record[kind]["fault"]:
                    print(f"seed {record['seed']}: {kind} {record[kind]['fault']}: {record[kind]['detail'][:300]}", flush=True)
            if count % 100 == 0:
                print(f"{count} of {len(seeds)} in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{count} models in {time.perf_counter() - start:.0f} s; {len(seeds) - count} left", flush=True)


def merge(paths: list[Path], output: Path | None) -> None:
    """One summary of several pieces, which must be of the same code."""
    pieces = [Piece.read(path) for path in paths]
    headers = {json.dumps(piece.header) for piece in pieces}
    if len(headers) != 1:
        raise SystemExit("pieces of different runs: " + "; ".join(sorted(headers)))
    records: dict[int, Record] = {}
    for piece in pieces:
        records |= piece.records
    result = pieces[0].header | summary([records[seed] for seed in sorted(records)])
    output = output or ROOT / "benchmarks" / "results" / f"fuzz-{len(records)}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "failures"}, indent=1))
    print(output)


def summary(records: list[Record]) -> dict[str, Any]:
    """The numbers of a run."""
    models, mutants = ([record[kind] for record in records] for kind in KINDS)
    seeds = [record["seed"] for record in records]
    errors: dict[str, float] = {}
    for record in records:
        found = [record[kind].get("error", 0.0) for kind in KINDS if not record[kind]["fault"]]
        errors[record["dtype"]] = max(errors.get(record["dtype"], 0.0), *found, 0.0)
    return {
        "seeds": [min(seeds), max(seeds)],
        "models": len(models),
        "mutants": len(mutants),
        "false_rewrites": sum(judgement["fault"] == "wrong" for judgement in (*models, *mutants)),
        "branches": Counter(branch for record in records for branch in record["branches"]),
        "rewritten": Counter(role for model in models for role in model["rewritten"]),
        "refused_as_listed": sum(
            len(record["branches"]) - len(record["model"]["rewritten"]) for record in records if not record["model"]["fault"]
        ),
        "refusals": Counter(without_names(reason) for model in models for reason in model.get("reasons", ())),
        "mutants_rewritten": sum(bool(mutant["rewritten"]) for mutant in mutants),
        "model_faults": Counter(model["fault"] for model in models if model["fault"]),
        "mutant_faults": Counter(mutant["fault"] for mutant in mutants if mutant["fault"]),
        "largest_error": errors,
        "slips": Counter(record["slip"] for record in records),
        "seconds_per_model": round(sum(record["seconds"] for record in records) / len(records), 2),
        "failures": [record for record in records if record["model"]["fault"] or record["mutant"]["fault"]],
    }


def without_names(reason: str) -> str:
    """A reason without what stands in parentheses: names of nodes, sizes, source lines."""
    return re.sub(r" ?\([^()]*\)", "", reason)


def replay(what: str, slip: str | None, shrunk: bool) -> None:
    """Print and judge again the models that failed in a piece or a summary, or the one model of a trail."""
    if what.lstrip().startswith("{"):
        again(ast.literal_eval(what), slip, shrunk, "")
        return
    path = Path(what)
    records = json.loads(path.read_text())["failures"] if path.suffix == ".json" else Piece.read(path).records.values()
    for record in records:
        for kind in KINDS:
            if record[kind]["fault"]:
                print(f"\nseed {record['seed']}: {kind} {record[kind]['fault']}", flush=True)
                again(record[kind]["trail"], record[kind]["mutant"], shrunk, record[kind]["fault"])


def again(trail: Mapping[str, str | int], slip: str | None, shrunk: bool, fault: str) -> None:
    from fuzz.choices import from_trail
    from fuzz.judge import judge, judge_mutant, Judgement
    from fuzz.model import generate, Model
    from fuzz.shrink import shrink

    def judged(model: Model) -> Judgement:
        parent = generate(from_trail(model.trail))
        return judge_mutant(parent, slip) if slip else judge(parent)

    judgement = judged(generate(from_trail(trail), slip))
    if not judgement.fault:
        print(f"no fault{f', not {fault}' if fault else ''}: rewritten {judgement.verdict and judgement.verdict.roles}")
    if shrunk and judgement.fault:
        kind = judgement.fault
        judgement = judged(shrink(trail, lambda model: judged(model).fault == kind, slip))
    print(judgement, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="number of models")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first one")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--nice", type=int, default=19, help="priority of the processes, 19 is the lowest")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after this time")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one model and its mutant may take")
    parser.add_argument("--out", type=Path, help="the piece: records are added to it, and what it holds is not judged again")
    parser.add_argument("--commit", help="what runs, where git cannot be asked")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="PIECE", help="sum up pieces instead")
    parser.add_argument("--output", type=Path, help="with --merge: the summary (default: benchmarks/results/fuzz-<models>.json)")
    parser.add_argument("--replay", metavar="FILE|TRAIL", help="judge again what failed in a piece or summary, or one trail")
    parser.add_argument("--slip", help="with a trail: the mutant")
    parser.add_argument("--shrink", action="store_true", help="with --replay: make what fails plain first")
    arguments = parser.parse_args()
    if arguments.merge:
        merge(arguments.merge, arguments.output)
    elif arguments.replay:
        replay(arguments.replay, arguments.slip, arguments.shrink)
    elif arguments.out:
        run(arguments)
    else:
        parser.error("--out, --merge or --replay")


if __name__ == "__main__":
    main()
