"""Writes ``docs/coverage.md`` from results: every verdict and number in it is of the run."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import expected, public, pypi, spellings
from .trial import TOLERANCE

HEAD = """# Coverage

Which spellings of sparse attention, and which models that nobody here wrote, the backend rewrites, and what it says about the
rest. `python benchmarks/coverage.py --repos DIR --write` makes this page: it runs every spelling, mutant and model forward and
backward in float32 on a CPU, with `inner="aot_eager"` and `profit="always"`, and compares outputs and all gradients with eager.

* **rewritten**: proven and replaced by an op. **refused**: runs as written, for the reason given. **left**: understood; no op is
  meant for it (full or causal attention). **no site**: no softmax or exponential that meets a contraction.
* **difference**: the largest norm-wise difference from eager over the output and all gradients. Above {tolerance:g}, or with NaN
  in other places, it is a **wrong result**.
* **expected**: `benchmarks/coverage/expected.md`, committed before the backend first ran on a model. Rows that were changed
  afterwards are listed [below](#expectations-that-were-changed), with the reason.

Run on {date} at commit {commit}, torch {torch}, Python {python}.
"""

SPELLINGS = """## Spellings

The table of `tests/spellings`. A mutant is a spelling with one integer, comparison or axis changed. It may be rewritten, with its
own parameters (a window of 15 is a window); it may not compute anything else than in eager. S7 (loops) and S10 (decode) have no
spellings here; real models below have them.

"""


def render(results: Mapping[str, Any], root: Path) -> tuple[str, int]:
    """The page, and how many results or verdicts are not as they have to be."""
    models = [name for name in (*pypi.MODELS, *public.MODELS) if name in results]
    judged = {name: _judge(name, results[name]) for name in models}
    classes = [name for name in spellings.CLASSES if name in results]
    parts = [
        _head(root),
        _summary(results, classes, models, judged),
        _classes(results, classes),
        _models("Packages on PyPI", [n for n in models if n in pypi.MODELS], results, judged),
        _models("Public repositories", [n for n in models if n in public.MODELS], results, judged),
        _breaks(models, results),
        _not_run(results),
        _unexpected(models, results, judged),
        _changed(),
    ]
    every = [*(results[n] for n in models), *(row for n in classes for row in results[n].get("rows", ()))]
    wrong = sum(_is_wrong(result) or _is_fault(result) for result in every)
    wrong += sum(not outcome.held for n in models for outcome in judged[n][0])
    return "\n".join(part for part in parts if part), wrong


def _head(root: Path) -> str:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return HEAD.format(tolerance=TOLERANCE, date=date.today(), commit=commit(root), **versions)


def line(name: str, result: Mapping[str, Any]) -> str:
    """Progress: one result in a line."""
    if "rows" in result:
        return f"{name}: {len(result['rows'])} rows, {sum(_is_wrong(r) or _is_fault(r) for r in result['rows'])} wrong"
    if not _ran(result):
        return f"{name}: not run: {result.get('not run') or result['eager']}"
    if result["fault"]:
        return f"{name}: fault: {result['fault']}"
    held, _ = _judge(name, result)
    off = [outcome.row.branch for outcome in held if not outcome.held]
    return f"{name}: {result['difference']:.1e}, {result['seconds']:.0f} s" + (f", unexpected: {', '.join(off)}" if off else "")


CHANGED = " with changes"


def commit(root: Path) -> str:
    """The commit of the working tree, and whether what decides results has been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "fsa_compile", "tests/spellings", "benchmarks/coverage")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (CHANGED if changed else "")


def _ran(result: Mapping[str, Any]) -> bool:
    return "sites" in result


def _is_fault(result: Mapping[str, Any]) -> bool:
    return bool(result.get("fault"))


def _is_wrong(result: Mapping[str, Any]) -> bool:
    return _ran(result) and not _is_fault(result) and not result["difference"] <= TOLERANCE


def _judge(name: str, result: Mapping[str, Any]) -> tuple[list[expected.Outcome], list[Mapping[str, Any]]]:
    return expected.outcomes(expected.of_model(name), result["sites"]) if _ran(result) else ([], [])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)]) + "\n"


def _verdicts(sites: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(site["verdict"] for site in sites)
    return ", ".join(f"{verdict} x{n}" if n > 1 else verdict for verdict, n in counts.items()) or expected.NO_SITE


def _reasons(sites: Sequence[Mapping[str, Any]]) -> str:
    """The distinct reasons of the sites that were not rewritten."""
    found = {}
    for site in sites:
        if site["reason"] and site["verdict"] != "rewritten":
            text = f"`{site['reason']['kind']}`: {site['reason']['text']}"
            example = site["counterexample"]
            if example:
                verb = "would stop seeing" if example["model_sees"] else "would start seeing"
                text += f" (query {example['query']} {verb} key {example['key']})"
            found.setdefault((site["reason"]["kind"], site["reason"]["text"]), text)
    return "; ".join(found.values())


def _parameters(sites: Sequence[Mapping[str, Any]]) -> str:
    """What was found of the first rewritten site."""
    hidden = ("heads", "kv_heads", "scale", "empty_rows")
    first = next((site for site in sites if site["verdict"] == "rewritten"), None)
    shown = {k: v for k, v in first["parameters"].items() if k not in hidden} if first else {}
    return f"{first['role']}: {', '.join(f'{k} {v}' for k, v in shown.items())}" if first else ""


def _summary(results: Mapping[str, Any], classes: Sequence[str], models: Sequence[str], judged: Mapping[str, Any]) -> str:
    rows = [row for name in classes for row in results[name].get("rows", ())]
    parents = [row for row in rows if "wanted" in row]
    mutants = [row for row in rows if "mutant" in row]
    alike = [row for row in rows if "lookalike" in row]
    branches = [outcome for name in models for outcome in judged[name][0]]
    targets = [outcome for outcome in branches if outcome.row.verdicts == {"rewritten"}]
    others = [outcome for outcome in branches if "rewritten" not in outcome.row.verdicts]
    ran = [results[name] for name in models if _ran(results[name])]
    done = sum(_roles(row) == row["wanted"] for row in parents)
    untouched = sum(not _roles(row) for row in alike)
    hits = sum(outcome.held for outcome in targets)
    kept = sum(outcome.held for outcome in others)
    safe = sum(all(site["verdict"] != "rewritten" for site in outcome.sites) for outcome in others)
    return "## Numbers\n\n" + _table(
        ("what", "number"),
        (
            ("spellings rewritten", f"{done} of {len(parents)}"),
            ("mutants run", len(mutants)),
            ("look-alikes untouched", f"{untouched} of {len(alike)}"),
            ("wrong results among spellings, mutants and look-alikes (false rewrites)", sum(map(_is_wrong, rows))),
            ("real models run", f"{len(ran)} of {len(pypi.MODELS) + len(public.MODELS)}"),
            ("their targets rewritten", f"{hits} of {len(targets)}"),
            ("their other branches untouched", f"{safe} of {len(others)}"),
            ("their other branches untouched, with an expected reason", f"{kept} of {len(others)}"),
            ("wrong results among models (false rewrites)", sum(_is_wrong(result) for result in ran)),
            ("models that the backend does not compile (with `strict`, which raises its own faults)", sum(map(_is_fault, ran))),
        ),
    )


def _roles(row: Mapping[str, Any]) -> list[str]:
    return sorted(site["role"] for site in row["sites"] if site["verdict"] == "rewritten")


def _classes(results: Mapping[str, Any], classes: Sequence[str]) -> str:
    """A table over the classes, then one with a line for each spelling."""
    titles = spellings.titles()
    over, each = [], []
    for name in classes:
        rows = results[name].get("rows", [])
        parents = [row for row in rows if "wanted" in row or "lookalike" in row]
        mutants = [row for row in rows if "mutant" in row]
        over.append(
            (
                name, titles[name], len(parents), sum(bool(_roles(row)) for row in parents), len(mutants),
                sum(bool(_roles(row)) for row in mutants), sum(_is_wrong(row) for row in rows),
                max((row["difference"] for row in rows), default=0.0),
            )
        )  # fmt: skip
        for row in parents:
            mine = [m for m in mutants if m["name"] == row["name"]]
            kinds = Counter(s["reason"]["kind"] for m in mine for s in m["sites"] if s["verdict"] == "refused" and s["reason"])
            verdict = row.get("fault") or _verdicts(row["sites"])
            each.append(
                (
                    name, f"`{row['name']}`", verdict, _parameters(row["sites"]) or _reasons(row["sites"]),
                    f"{sum(bool(_roles(m)) for m in mine)} of {len(mine)}" if mine else "",
                    ", ".join(f"{kind} x{n}" for kind, n in sorted(kinds.items())),
                    sum(_is_wrong(r) for r in (row, *mine)),
                )
            )  # fmt: skip
    if not over:
        return ""
    head = ("class", "what", "spellings", "with a rewrite", "mutants", "with a rewrite", "false rewrites", "largest difference")
    shown = [(*row[:-1], f"{row[-1]:.1e}") for row in over]
    text = SPELLINGS + _table(head, shown) + "\n"
    head = ("class", "spelling", "verdict", "as what, or why not", "mutants rewritten", "refused mutants", "false rewrites")
    return text + _table(head, each)


def _models(title: str, names: Sequence[str], results: Mapping[str, Any], judged: Mapping[str, Any]) -> str:
    rows = []
    for name in names:
        result = results[name]
        if not _ran(result):
            continue
        found, others = judged[name]
        if result["fault"]:
            rows.append((name, "", "", "", f"**fault**: {result['fault']}", "", "**no**", ""))
            continue
        last = f"{result['difference']:.1e}" + (" (**wrong**)" if _is_wrong(result) else "")
        last += ", eager has NaN" if result["nan"] else ""
        trace = f"{result['graphs']} graphs" if result["breaks"] else "one graph"
        for k, outcome in enumerate(found):
            row = outcome.row
            what = _parameters(outcome.sites) or _reasons(outcome.sites) or row.why
            held = "yes" if outcome.held else "**no**"
            first = (name, trace) if k == 0 else ("", "")
            rows.append((*first, row.branch, row.kind, _verdicts(outcome.sites), what, held, last if k == 0 else ""))
        for site in others:
            place = f"{site['source']} {site['module']}"
            rows.append(("", "", f"other: {place}", "", site["verdict"], _parameters([site]) or _reasons([site]), "**no**", ""))
    head = ("model", "traces as", "branch", "class", "verdict", "as what, or why not", "expected", "difference")
    return f"## {title}\n\n{_table(head, rows)}" if rows else ""


def _breaks(names: Sequence[str], results: Mapping[str, Any]) -> str:
    rows = []
    for name in names:
        result = results[name]
        if _ran(result) and result["breaks"]:
            silent = "nothing" if result["graphs"] else "nothing: no graph reaches it"
            notes = "; ".join(dict.fromkeys(result["notes"])) or silent
            rows.append((name, result["graphs"], notes, result["break_reason"]))
    if not rows:
        return ""
    text = "## Graph breaks\n\nModels that Dynamo does not trace as one graph are analysed piece by piece.\n\n"
    return text + _table(("model", "graphs", "what the report says", "what Dynamo says with fullgraph=True"), rows)


def _not_run(results: Mapping[str, Any]) -> str:
    rows = []
    for name in (*pypi.MODELS, *public.MODELS):
        result = results.get(name, {"not run": "not asked for in this run"})
        if not _ran(result):
            rows.append((name, result.get("not run") or f"fails in eager: {result['eager']}"))
    text = _table(("model", "why"), rows) if rows else "Everything ran.\n"
    commits = _table(("repository", "commit"), [(name, f"`{commit[:12]}`") for name, commit in public.REPOSITORIES.items()])
    pinned = "## Repositories\n\nRead and run at these commits; nothing of them is in this repository.\n\n"
    return f"## Not run\n\n{text}\n{pinned}{commits}"


def _unexpected(names: Sequence[str], results: Mapping[str, Any], judged: Mapping[str, Any]) -> str:
    rows = [
        (
            name, outcome.row.branch, " or ".join(sorted(outcome.row.verdicts)), ", ".join(sorted(map(str, outcome.row.reasons))),
            "fault" if results[name]["fault"] else _verdicts(outcome.sites), results[name]["fault"] or _reasons(outcome.sites),
            outcome.row.why,
        )
        for name in names
        for outcome in judged[name][0]
        if not outcome.held
    ]  # fmt: skip
    head = ("model", "branch", "expected", "with reason", "got", "reason", "expected because")
    return "## Not as expected\n\n" + (_table(head, rows) if rows else "Nothing.\n")


def _changed() -> str:
    rows = [(row.model, row.branch, row.changed) for row in expected.read() if row.changed]
    text = _table(("model", "branch", "what was expected first, and why that was wrong"), rows) if rows else "None.\n"
    return f"## Expectations that were changed\n\n{text}"
