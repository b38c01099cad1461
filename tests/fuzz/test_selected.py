"""Random models with a selected branch: rewritten and equal to eager; their mutants: equal to their own eager."""

import os

import pytest

from fuzz.strategies import fuzz

pytestmark = pytest.mark.skipif(
    "FSA_FUZZ" not in os.environ,
    reason="random selected branches still meet refusals that refusals.py does not list (dynamic lengths of lists that are "
    "inputs, added -inf beside a map of blocks), and shrinking one takes minutes: FSA_FUZZ=1 runs them",
)


@pytest.mark.parametrize("chunk", range(8))
def test_selected(chunk):
    fuzz(("selected",), chunk, models=8)
