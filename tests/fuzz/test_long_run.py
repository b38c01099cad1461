"""The pieces of a long run: they can be gone on with, cut off, put together, and nothing is counted twice."""

import json
import subprocess
import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
HEADER = {"commit": "0", "torch": "0", "python": "0"}


@pytest.fixture(scope="module")
def program():
    spec = spec_from_file_location("long_run", PROGRAM)
    module = module_from_spec(spec)
    sys.modules["long_run"] = module  # Where dataclasses look for annotations.
    spec.loader.exec_module(module)
    yield module
    del sys.modules["long_run"]


def record(seed, fault="", mutant_fault=""):
    trail = {"branches": "window"}
    return {
        "seed": seed,
        "branches": ["window"],
        "dtype": "float32",
        "slip": "values:1",
        "model": {
            "fault": fault,
            "rewritten": [] if fault else ["sliding_window"],
            "error": 1e-6,
            "owed": [],
            "reasons": [f"mask: no rule (n{seed}) (<model {seed}>:3)"] if fault else [],
        }
        | ({"detail": "why", "trail": trail, "mutant": None} if fault else {}),
        "mutant": {"fault": mutant_fault, "rewritten": []}
        | ({"detail": "why", "trail": trail, "mutant": "window.values:1"} if mutant_fault else {}),
        "seconds": 2.0,
    }


def write(path, *records, header=HEADER, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)) + tail)
    return path


def test_merge_counts_each_model_once(program, tmp_path):
    first = write(tmp_path / "a", record(0), record(1, "refused"), record(2))
    second = write(tmp_path / "b", record(2), record(3, "refused", "wrong"))
    program.merge([first, second], tmp_path / "sum.json")
    result = json.loads((tmp_path / "sum.json").read_text())
    assert (result["models"], result["seeds"], result["commit"]) == (4, [0, 3], "0")
    assert result["false_rewrites"] == 1
    assert result["model_faults"] == {"refused": 2} and result["mutant_faults"] == {"wrong": 1}
    assert result["branches"] == {"window": 4} and result["rewritten"] == {"sliding_window": 2}
    assert result["refusals"] == {"mask: no rule": 2}, "one cause, whatever the names are"
    assert [failure["seed"] for failure in result["failures"]] == [1, 3]


def test_pieces_of_other_code_are_not_merged(program, tmp_path):
    other = write(tmp_path / "b", record(1), header=HEADER | {"commit": "1"})
    with pytest.raises(SystemExit, match="different runs"):
        program.merge([write(tmp_path / "a", record(0)), other], tmp_path / "sum.json")


def test_run_goes_on_after_a_line_that_was_cut_off(program, tmp_path, monkeypatch):
    """What a piece holds is not judged again, the model whose record was cut off is."""
    piece = write(tmp_path / "a", record(0), record(1), tail='{"seed": 2, "bran')
    monkeypatch.setattr(program, "environment", lambda _commit: HEADER)
    monkeypatch.setattr(program, "judge_all", lambda seeds, *_: map(record, seeds))
    settings = Namespace(out=piece, commit=None, seed=0, count=5, jobs=1, nice=0, limit=1.0, seconds=1.0)
    program.run(settings)
    assert [json.loads(line)["seed"] for line in piece.read_text().splitlines()[1:]] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(program, "environment", lambda _commit: HEADER | {"commit": "1"})
    with pytest.raises(SystemExit, match="another file"):
        program.run(settings)


def test_model_that_hangs_or_kills_its_process_is_a_fault(tmp_path):
    """In a program of its own, which starts processes as the long run does."""
    text = f"""
import os, sys, time
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("long_run", {str(PROGRAM)!r})
long_run = sys.modules["long_run"] = module_from_spec(spec)
spec.loader.exec_module(long_run)

def work(tasks, niceness):
    while (seed := tasks.recv()) is not None:
        if seed == 1:
            time.sleep(600)
        if seed == 2:
            os._exit(3)
        tasks.send({{"seed": seed, "model": {{"fault": ""}}}})

long_run.work = work
if __name__ == "__main__":
    records = list(long_run.judge_all(iter(range(5)), 2, 0, -57.0, 100.0))
    print(sorted((record["seed"], record["model"]["fault"]) for record in records))
"""
    program = tmp_path / "program.py"
    program.write_text(text)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[(0, ''), (1, 'timeout'), (2, 'died'), (3, ''), (4, '')]", done.stderr
