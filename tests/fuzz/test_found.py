"""Models that random runs found, made plain: each was refused once, or crashed, for the reason beside it."""

import pytest

from fuzz.choices import from_trail, Option
from fuzz.judge import judge
from fuzz.model import generate

FOUND: dict[str, dict[str, Option]] = {
    "argsort had no facts": {"selected.form": "gather", "selected.best": "argsort"},
    "nothing was known of the first part of a sort": {"selected.form": "gather", "selected.best": "sort"},
    "nor of an argsort where a penalty needs a key in every row": {
        "selected.rule": "listed",
        "selected.best": "argsort",
        "selected.apply": "penalty",
        "selected.fill": "finfo.min",
    },
    "inf - inf in a comparison was no number for the solver": {
        "selected.best": "sort",
        "selected.force": "add",
        "selected.padding": "minus",
        "selected.unused": "score",
        "selected.apply": "additive",
    },
    "copies joined by cat were as many masks": {"selected.head_order": "tile", "selected.mask_heads": "tile_cat"},
    "a count of ones was no membership": {"selected.membership": "scatter_add", "selected.apply": "additive_where", "selected.fill": "-1e9"},
    "all of the gathered copies are seen: that was full attention": {
        "batch": 1,
        "kv_heads": 1,
        "selected.form": "gather",
        "selected.rule": "listed",
        "selected.product": "sdpa",
    },
    "an embedding of computed rows was not looked through": {"selected.form": "gather", "selected.gather": "embedding"},
    "guards that make two lengths equal were not used": {"selected.form": "gather", "dynamic": "mark"},
    "nor those that make equally many blocks of both": {
        "branches": "compressed",
        "compressed.kind": "conv",
        "dynamic": "mark",
    },
    "the fake SDPA does not compare the lengths of keys and values": {"selected.product": "sdpa", "dynamic": "mark"},
    "an entry at a pinned coordinate was not found in the user's list": {
        "selected.padding": "minus",
        "selected.unused": "score",
        "selected.membership": "index_put",
    },
    "n == 4 * (n // 4) did not say that 4 divides n": {
        "entry": "projections",
        "dynamic": "mark",
        "selected.to_tokens": "expand",
    },
}


@pytest.mark.parametrize("trail", FOUND.values(), ids=FOUND)
def test_found(trail):
    judgement = judge(generate(from_trail(trail)))
    assert not judgement.fault, str(judgement)
    assert not judgement.owed, "a row of the table of refusals covers it"
