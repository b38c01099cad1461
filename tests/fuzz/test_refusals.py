"""The table of what is still owed has no row too many."""

import pytest

from fuzz.check import check
from fuzz.choices import from_trail
from fuzz.model import generate
from fuzz.refusals import may_refuse, REFUSALS


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: f"{row.branch}-{'-'.join(map(str, row.choices.values()))}")
def test_row_is_still_owed(row):
    model = generate(from_trail(row.example()))
    assert row.branch in may_refuse(model), "the example does not take the row's decisions"
    verdict = check(model)
    assert not verdict.wrong
    assert verdict.rewritten < len(model.branches), "recognised now: remove this row"
    assert any(reason.startswith(row.reason) for reason in verdict.reasons), f"another reason now: {verdict.reasons}"
