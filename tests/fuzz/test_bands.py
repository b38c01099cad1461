"""Random models with window and compressed branches, alone or beside a selected one, and their mutants."""

import pytest

from fuzz.model import SEVERAL_BRANCHES
from fuzz.strategies import fuzz


@pytest.mark.parametrize("chunk", range(6))
def test_one_branch(chunk):
    fuzz(("window", "compressed"), chunk, models=8)


@pytest.mark.parametrize("chunk", range(3))
def test_several_branches(chunk):
    fuzz(SEVERAL_BRANCHES, 100 + chunk, models=4)
