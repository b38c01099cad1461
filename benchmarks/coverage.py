"""Which spellings and real models are rewritten, refused or left, and whether results are eager's: ``docs/coverage.md``.

    python benchmarks/coverage.py                              # spellings and models of PyPI; prints the page
    python benchmarks/coverage.py --repos DIR --write          # with clones of public repositories; writes the page
    python benchmarks/coverage.py --repos DIR --only MoBA      # the models whose name contains "MoBA"
    python benchmarks/coverage.py --results FILE ...           # in pieces: keeps results, runs what the file lacks of this commit

Each model runs in a process of its own, on the CPU, forward and backward in float32, and is compared with eager and with
``benchmarks/coverage/expected.md``, whose rows were committed before the first run. The exit status is 1 if a compiled result is
not eager's, or a verdict is not the expected one. fla-core is tried where it is installed (``pip install --no-deps fla-core``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of this folder, whose `coverage` would hide the package of that name

from benchmarks.coverage import page, public, pypi, spellings, trial

RESULT = "coverage result: "
SECONDS = 600
"""A model that takes longer is reported as not run."""


def run_one(name: str, repos: Path | None) -> dict[str, Any]:
    """One model, or all spellings of one class, in this process."""
    if name in spellings.CLASSES:
        return spellings.run(name)
    try:
        if name in pypi.MODELS:
            return trial.run(pypi.MODELS[name]())
        if repos is None:
            raise trial.NotRun("a public repository: needs --repos")
        return trial.run(public.MODELS[name].build(repos=repos))
    except trial.NotRun as reason:
        return {"not run": str(reason)}


def in_fresh_process(name: str, repos: Path | None) -> dict[str, Any]:
    """`run_one` apart, so that no model meets another's modules, compiled code or crash."""
    command = [sys.executable, __file__, "--one", name, *(["--repos", str(repos)] if repos else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"not run": f"took more than {SECONDS} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"not run": f"exit status {done.returncode}: {' '.join(last)[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", type=Path, help="directory of clones of the public repositories")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md instead of printing it")
    parser.add_argument("--only", default="", help="run what has this in its name")
    parser.add_argument(
        "--results", type=Path, help="JSON file to keep results in, by commit; those of this commit are not run again"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        result = run_one(arguments.one, arguments.repos)
        print(f"\n{RESULT}{json.dumps(result)}")
        return

    kept, commit = arguments.results, page.commit(ROOT)
    archive: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    results = archive.setdefault(commit, {})
    if commit.endswith(page.CHANGED):
        results.clear()  # who knows which changes those were
    names = [name for name in (*public.MODELS, *pypi.MODELS, *spellings.CLASSES) if arguments.only.lower() in name.lower()]
    for name in names:
        if name not in results:
            results[name] = in_fresh_process(name, arguments.repos)
            print(page.line(name, results[name]), file=sys.stderr, flush=True)
            if kept:
                kept.write_text(json.dumps(archive))
    text, wrong = page.render(results, ROOT)
    if arguments.write:
        (ROOT / "docs" / "coverage.md").write_text(text)
    else:
        print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
