"""Draws a `Report` for a terminal. The only module that knows about rich."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, IO, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fsa_compile.report import GraphReport, Report, Selection, Site, Verdict

_STYLE = {Verdict.REWRITTEN: "bold green", Verdict.REFUSED: "bold yellow", Verdict.LEFT: "cyan"}

# Wide enough for the table where nobody is looking at a terminal (a log file, a pipe).
_FILE_WIDTH = 120

# Below this the table's columns would break words; sites become paragraphs.
_TABLE_WIDTH = 90


def show(report: Report, detail: Literal["summary", "full"] = "summary", file: IO[str] | None = None) -> None:
    """Print `report` to `file` (default: stderr), in colour if that is a terminal.

    Args:
        report: What to print.
        detail: ``"summary"`` for one table row per kind of site, ``"full"`` with proofs, counterexamples and times.
        file: A text stream.
    """
    file = sys.stderr if file is None else file
    if file is None:  # no stderr: a windowed application
        return
    console = Console(file=file)
    if console.is_terminal:
        _draw(console, report, detail)
    else:
        # A report must never be what fails a compilation, so characters that the stream cannot write are replaced.
        encoding = getattr(file, "encoding", None) or "utf-8"
        file.write(render(report, detail).encode(encoding, "replace").decode(encoding))


def render(report: Report, detail: Literal["summary", "full"] = "summary", width: int = _FILE_WIDTH) -> str:
    """The text that `show` prints, without colour, `width` columns wide."""
    stream = io.StringIO()
    _draw(Console(file=stream, width=width, color_system=None), report, detail)
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def _draw(console: Console, report: Report, detail: str) -> None:
    full = detail == "full"
    console.print(_headline(report))
    for graph in report.graphs:
        if not graph.sites:
            console.print(Text(f"{graph.name}: no attention found ({_count(graph.nodes, 'node')})"))
        else:
            if len(report.graphs) > 1:
                console.print(Text(graph.name, style="italic"))
            console.print(_table(graph, full) if console.width >= _TABLE_WIDTH else _paragraphs(graph, full))
        _bullets(console, graph.notes)
        if full and graph.seconds:
            times = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in graph.seconds.items())
            _bullets(console, [f"{graph.nodes} nodes; {times}"])
    _bullets(console, report.notes)


def _headline(report: Report) -> Text:
    sites, graphs = len(report.sites), len(report.graphs)
    line = Text("fsa_compile: ", style="bold")
    if not report.graphs:
        line.append("no graphs")
    elif not sites:
        line.append(f"no attention found in {_count(graphs, 'graph')}")
    else:
        line.append(f"{report.rewritten} of {_count(sites, 'attention site')} rewritten")
        line.append(f" in {_count(graphs, 'graph')}" if graphs > 1 else "")
    return line


def _table(graph: GraphReport, full: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("role", "verdict", "where"):
        table.add_column(column, overflow="fold")
    table.add_column("what", overflow="fold", ratio=1)
    for role, verdict, where, what in _rows(graph, full):
        table.add_row(role, verdict, Text("\n").join(where), Text("\n").join(what))
    return table


def _paragraphs(graph: GraphReport, full: bool) -> Group:
    blocks: list[RenderableType] = []
    for role, verdict, where, what in _rows(graph, full):
        blocks += [Text(" ").join((role, verdict)), Padding(Text("\n").join((*where, *what)), (0, 0, 0, 2))]
    return Group(*blocks)


def _rows(graph: GraphReport, full: bool) -> Iterator[tuple[Text, Text, list[Text], list[Text]]]:
    """For each kind of site: role, verdict, lines that say where it is, lines that say what was found."""
    for site, modules in _collapse(graph.sites):
        role = Text(site.role if len(modules) == 1 else f"{site.role} x{len(modules)}")
        module = _merge_names(modules)
        where = [Text(site.source), *([Text(module, style="dim")] if module else [])]
        yield role, Text(str(site.verdict), style=_STYLE[site.verdict]), where, list(_what(site, full=full))


def _what(site: Site, *, full: bool) -> Iterator[Text]:
    if site.reason is not None:
        reason = site.reason.text if site.reason.source == site.source else str(site.reason)
        yield Text(f"{site.reason.kind}: {reason}" if full else reason)
    if site.counterexample is not None:
        yield Text(str(site.counterexample), style="yellow")
    if site.parameters:
        yield Text(", ".join(f"{name}={_short(value)}" for name, value in site.parameters.items()), style="dim")
    yield from _chosen(site.selection, full=full) if site.selection is not None else ()
    if full:
        for proof in site.proofs:
            yield Text(f"proven: {proof.obligation} ({proof.method}, {proof.milliseconds:.1f} ms)", style="dim")
        for check in site.checks:
            found = "" if check.error is None else f"largest error {check.error:.1e}, "
            yield Text(f"{check.kind}: {found}{check.text}", style="dim")


def _chosen(selection: Selection, *, full: bool) -> Iterator[Text]:
    if selection.fused:
        what = ", ".join(f"{name}={_short(value)}" for name, value in selection.parameters.items())
        yield Text(f"blocks chosen by fsa::select_blocks: {what}", style="dim")
    elif full and selection.reason is not None:
        yield Text(f"blocks chosen by the model's own scores: {selection.reason.text}", style="dim")
    for proof in selection.proofs if full else ():
        yield Text(f"proven: {proof.obligation} ({proof.method}, {proof.milliseconds:.1f} ms)", style="dim")


def _collapse(sites: Iterable[Site]) -> Iterator[tuple[Site, list[str]]]:
    """Sites that differ only in module, node, times and errors: one of them, and the modules of all, in graph order."""
    groups: dict[str, tuple[Site, list[str]]] = {}
    for site in sites:
        proofs = tuple(replace(proof, milliseconds=0.0) for proof in site.proofs)
        checks = tuple(replace(check, error=None, text="") for check in site.checks if check.error is not None)
        unchecked = tuple(check for check in site.checks if check.error is None)
        key = repr(replace(site, module="", node="", proofs=proofs, checks=checks + unchecked))
        groups.setdefault(key, (site, []))[1].append(site.module)
    yield from groups.values()


def _merge_names(names: list[str]) -> str:
    """``layers.0.attn, layers.1.attn, layers.3.attn`` as ``layers.{0-1,3}.attn``; unlike names as the first and a count."""
    distinct = list(dict.fromkeys(names))
    parts = [re.split(r"(\d+)", name) for name in distinct]
    varying = {i for other in parts for i, part in enumerate(other) if i < len(parts[0]) and part != parts[0][i]}
    if len(distinct) > 1 and len({len(p) for p in parts}) == 1 and len(varying) == 1 and (i := varying.pop()) % 2:
        numbers = _ranges(sorted(int(p[i]) for p in parts))
        return "".join([*parts[0][:i], f"{{{numbers}}}", *parts[0][i + 1 :]])
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]} and {len(distinct) - 1} more"


def _ranges(numbers: list[int]) -> str:
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _bullets(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Padding(Text(f"note: {line}"), (0, 0, 0, 2)))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
