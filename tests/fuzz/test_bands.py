"""Random models with window and compressed branches, alone or beside a selected one, and their mutants."""

import pytest

from fuzz.model import SEVERAL_BRANCHES
from fuzz.strategies import fuzz


@pytest.mark.parametrize("chunk", range(9))
def test_one_branch(chunk):
    fuzz(("window", "compressed"), chunk, models=12)


@pytest.mark.parametrize("chunk", range(4))
def test_several_branches(chunk):
    fuzz(SEVERAL_BRANCHES, 100 + chunk, models=12)
