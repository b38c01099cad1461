"""Random models with a selected branch: rewritten and equal to eager; their mutants: equal to their own eager."""

import pytest

from fuzz.strategies import fuzz


@pytest.mark.parametrize("chunk", range(12))
def test_selected(chunk):
    fuzz(("selected",), chunk, models=12)
