"""What has to happen to each attention of each real model: reads ``expected.md``, which says how it came about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsa_compile.report import ReasonKind, Verdict

TABLE_FILE = Path(__file__).with_name("expected.md")
_NONE = "-"


@dataclass(frozen=True)
class Expected:
    """One line of the table.

    Args:
        model: Name of the model, and of its builder.
        branch: What the attention is called here.
        where: ``"file.py:10-20"`` or ``"file.py:10-20@layers.0."``: the lines that hold its contraction, and the module.
        kind: Class of the spelling.
        verdict: What has to happen.
        reasons: Kinds of reason of which each tells the user the truth; empty for rewritten ones.
        why: For rewritten ones what makes it hard, for others what it is instead.
        changed: What was expected first and why that was wrong, or nothing.
    """

    model: str
    branch: str
    where: str
    kind: str
    verdict: Verdict
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
            kinds = frozenset(ReasonKind(kind) for kind in reasons.split(", ") if kind != _NONE)
            rows.append(
                Expected(model, branch, where, kind, Verdict(verdict), kinds, why, "" if changed == _NONE else changed)
            )
    return tuple(rows)


def of_model(model: str) -> tuple[Expected, ...]:
    """The rows of one model.

    Raises:
        KeyError: If the table has none.
    """
    rows = tuple(row for row in read() if row.model == model)
    if not rows:
        raise KeyError(f"expected.md has no row for {model!r}")
    return rows
