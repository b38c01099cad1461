"""The lifted form of every spelling is the one in `golden/`.

A new torch that traces a spelling to other ops, or a rule that reads one differently, shows here as a difference between two
texts and not only as a rewrite that has gone. After a change that is meant, write the texts anew and read the difference::

    FSA_GOLDEN=write pytest tests/spellings/test_golden.py && git diff tests/spellings/golden
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path

import pytest

from .lifted_form import lifted
from .spelling import Spelling
from .test_spellings import each_spelling, SEED, SPELLINGS

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("FSA_GOLDEN") == "write"


@each_spelling
def test_the_lifted_form_is_the_known_one(spelling: Spelling) -> None:
    got = lifted(spelling, SEED)
    if WRITE:
        path_of(spelling).write_text(got)
    found = difference(spelling, got)
    if found:
        pytest.fail(f"{spelling.name} is lifted to another form (see the top of this file):\n{found}", pytrace=False)


def path_of(spelling: Spelling) -> Path:
    return GOLDEN / f"{spelling.name}.txt"


def difference(spelling: Spelling, got: str) -> str:
    """From the known text to `got`, "" if they are the same."""
    path = path_of(spelling)
    want = path.read_text() if path.exists() else ""
    return "".join(difflib.unified_diff(want.splitlines(True), got.splitlines(True), f"golden/{path.name}", "now"))


@pytest.mark.parametrize("name", ["band", "scatter_then_index", "overlapping_means"])
def test_a_mutant_shows_as_a_difference(name: str) -> None:
    """Of a mutant that is rewritten with other parameters, or not at all."""
    spelling = next(s for s in SPELLINGS if s.name == name)
    for mutant in spelling.mutants:
        other = dataclasses.replace(spelling, build=lambda generator, m=mutant: spelling.build(generator, **m.changes))
        found = difference(spelling, lifted(other, SEED))
        assert "\n-" in found and f"golden/{name}.txt" in found, mutant.name


def test_there_is_no_text_without_a_spelling() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {s.name for s in SPELLINGS}
