"""What has to happen to each attention of each real model: reads ``expected.md``, which says how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsa_compile.report import ReasonKind, Verdict

TABLE_FILE = Path(__file__).with_name("expected.md")
NO_SITE = "no site"
_NONE = "-"
_VERDICTS = {*(v.value for v in Verdict), NO_SITE}


@dataclass(frozen=True)
class Expected:
    """One line of the table.

    Args:
        model: Name of the model, and of its builder.
        branch: What the attention is called here.
        where: ``"file.py:10-20"`` or ``"file.py:10-20@layers.0."``: the lines that hold its contraction, and the module.
        kind: Class of the spelling.
        verdicts: What may happen to its sites: verdicts, or that there is none.
        reasons: Kinds of reason of which each tells the user the truth; empty for rewritten ones.
        why: For rewritten ones what makes it hard, for others what it is instead.
        changed: What was expected first and why that was wrong, or nothing.
    """

    model: str
    branch: str
    where: str
    kind: str
    verdicts: frozenset[str]
    reasons: frozenset[ReasonKind]
    why: str
    changed: str

    def holds(self, source: str, module: str) -> bool:
        """Whether a site at ``"file.py:12"`` in that module can belong to this row."""
        place, _, inside = self.where.partition("@")
        file, _, lines = place.partition(":")
        first, _, last = lines.partition("-")
        name, _, line = source.partition(":")
        here = name == file and line.isdigit() and int(first) <= int(line) <= int(last or first)
        return here and module.startswith(inside)


def read(file: Path = TABLE_FILE) -> tuple[Expected, ...]:
    """The rows of all tables of the file, in order.

    Raises:
        ValueError: If a row has another number of cells, or an unknown verdict or reason.
    """
    rows = []
    for line in file.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| model "):
            model, branch, where, kind, verdict, reasons, why, changed = (cell.strip() for cell in line.strip("|").split("|"))
            verdicts = frozenset(verdict.split(" or "))
            if not verdicts <= _VERDICTS:
                raise ValueError(f"{line}: unknown verdict {verdict!r}")
            kinds = frozenset(ReasonKind(kind) for kind in reasons.split(", ") if kind != _NONE)
            rows.append(
                Expected(model, branch, where, kind, verdicts, kinds, why, "" if changed == _NONE else changed)
            )
    return tuple(rows)


def of_model(model: str) -> tuple[Expected, ...]:
    """The rows of one model, none for a model that is only shown not to run."""
    return tuple(row for row in read() if row.model == model)


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Args:
        row: The row.
        sites: Its sites, as the report's plain data has them.
        held: Whether everything is as expected.
    """

    row: Expected
    sites: tuple[Mapping[str, Any], ...]
    held: bool


def outcomes(rows: Sequence[Expected], sites: Sequence[Mapping[str, Any]]) -> tuple[list[Outcome], list[Mapping[str, Any]]]:
    """Compares the rows of a model with its sites.

    Returns:
        The outcome of each row, and the sites that belong to none.
    """
    claimed: dict[Expected, list[Mapping[str, Any]]] = {row: [] for row in rows}
    others = []
    for site in sites:
        row = next((row for row in rows if row.holds(site["source"], site["module"])), None)
        (others if row is None else claimed[row]).append(site)
    found = [
        Outcome(row, tuple(mine), all(_as_expected(row, s) for s in mine) if mine else NO_SITE in row.verdicts)
        for row, mine in claimed.items()
    ]
    return found, others


def _as_expected(row: Expected, site: Mapping[str, Any]) -> bool:
    right_reason = site["verdict"] == Verdict.REWRITTEN or not row.reasons or (site["reason"] or {}).get("kind") in row.reasons
    return site["verdict"] in row.verdicts and right_reason
