"""What is known of the sizes of scores: on data, and through to rows that are known to see their own block."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsa_compile.passes import expr as x
from fsa_compile.passes.ranges import Ranges
from fsa_compile.passes.reader import Mode
from fsa_compile.report import Verdict

from .end_to_end import BATCH, BLOCK, DIM, HEADS, LENGTH, TOP_K, assert_rewritten, compiled_like_eager, only_site, qkv
from .shadow_oracle import read_result
from .test_facts import assert_hold

ROWS, COLUMNS, GROUPS = 4, 6, 3
INF = math.inf
OWN = torch.arange(LENGTH)[:, None] // BLOCK == torch.arange(LENGTH // BLOCK)
VISIBLE = torch.arange(LENGTH)[:, None] >= (torch.arange(LENGTH // BLOCK) + 1) * BLOCK - 1


def masked(s: Tensor) -> Tensor:
    """Columns before the row only: row 0 sees none."""
    return s.masked_fill(torch.arange(COLUMNS) >= torch.arange(ROWS)[:, None], -INF)


def own(s: Tensor, value: float = 1.0) -> Tensor:
    return (torch.arange(COLUMNS) == torch.arange(ROWS)[:, None]).to(s.dtype) * value


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.softmax(-1),
    "softmax of masked": lambda s: masked(s).softmax(-1),
    "softmax of masked, first axis": lambda s: masked(s).softmax(1),
    "zeros for NaN": lambda s: masked(s).softmax(-1).nan_to_num(0.0),
    "masked behind": lambda s: masked(s).softmax(-1).masked_fill(masked(s) == -INF, 0.0),
    "kept where some": lambda s: torch.where((masked(s) > -INF).any(-1, keepdim=True), masked(s).softmax(-1), 0.0),
    "finite fill": lambda s: s.masked_fill(torch.arange(COLUMNS) >= torch.arange(ROWS)[:, None], -1e9).softmax(-1),
    "raised": lambda s: s.softmax(-1) + own(s, 10.0),
    "raised and lowered": lambda s: s.softmax(-1) + own(s, 10.0) - 2 * own(s),
    "raised NaN": lambda s: masked(s).softmax(-1) + own(s, 10.0),
    "product": lambda s: s.softmax(-1) * -3.0 * s.sigmoid(),
    "sum": lambda s: s.softmax(-1).expand(GROUPS, -1, -1).sum(0),
    "sum of all": lambda s: s.softmax(-1).expand(GROUPS, -1, -1).sum((0, 1), keepdim=True)[0].expand(ROWS, -1),
    "sum of NaN": lambda s: masked(s).softmax(-1).expand(GROUPS, -1, -1).sum(0),
    "mean": lambda s: (5 * s.softmax(-1)).expand(GROUPS, -1, -1).mean(0),
    "maximum": lambda s: s.softmax(-1).expand(GROUPS, -1, -1).amax(0),
    "maximum with": lambda s: torch.maximum(s.softmax(-1), own(s, 7.0)),
    "minimum with": lambda s: torch.minimum(s.softmax(-1), own(s, -7.0)),
    "maximum, values": lambda s: s.softmax(-1).expand(GROUPS, -1, -1).max(0).values,
    "contraction": lambda s: s.softmax(-1) @ (torch.arange(COLUMNS)[:, None] <= torch.arange(COLUMNS)).to(s.dtype),
    "pooled": lambda s: F.avg_pool1d(s.softmax(-1), 3, 1, 1),
    "pooled maximum": lambda s: F.max_pool1d(s.softmax(-1), 3, 1, 1),
    "one cast": lambda s: (s.softmax(-1) + own(s, 2.0)).bfloat16().float(),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_ranges_hold_on_data(name: str, spread: float) -> None:
    s = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * spread
    reading = read_result(lambda s: FORMULAS[name](s).clone(), s)
    e = reading.reader.read(reading.node, reading.axes, Mode.VALUE)
    facts = list(Ranges(reading.reader, (x.ZERO,)).facts(e))
    assert_hold(reading, facts, reading.axes, ranked=name != "zeros for NaN")
    if "NaN" not in name or "zeros" in name:
        assert facts


@pytest.mark.parametrize("name", ["softmax of masked", "raised NaN", "sum of NaN"])
def test_nothing_is_said_of_rows_that_are_nan(name: str) -> None:
    """Row 0 is NaN, which a top-k ranks above everything: were it in range for all rows, the fact would be false there."""
    s = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    reading = read_result(lambda s: FORMULAS[name](s).clone(), s)
    assert reading.eager[0].isnan().any()
    e = reading.reader.read(reading.node, reading.axes, Mode.VALUE)
    for lo, hi in (Ranges(reading.reader, ()).of_leaf(t, g) for g, t in x.cases(e)):
        assert lo == -INF or hi == INF


# ------------------------------------------------------------------------------------------- forced blocks


def probabilities(q: Tensor, k: Tensor, fill: float = -INF, zero: bool = True) -> Tensor:
    """(b, h, n, blocks), without gradient; a query before the end of the first block sees none of them."""
    logits = (q @ k.unflatten(2, (-1, BLOCK)).mean(3).mT * DIM**-0.5).masked_fill(~VISIBLE, fill)
    p = logits.softmax(-1).detach()
    return p.nan_to_num(0.0) if zero else p


def attend(q: Tensor, k: Tensor, v: Tensor, force: Callable[[Tensor], Tensor], **options: object) -> Tensor:
    chosen = force(probabilities(q, k, **options)).topk(TOP_K, -1).indices  # type: ignore[arg-type]
    blocks = torch.zeros(*chosen.shape[:-1], LENGTH // BLOCK, dtype=torch.bool).scatter(-1, chosen, True)
    mask = blocks.repeat_interleave(BLOCK, -1) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return (q @ k.mT * DIM**-0.5).masked_fill(~mask, -INF).softmax(-1) @ v


def stored(p: Tensor, value: float) -> Tensor:
    p = p.clone()
    p[:, :, torch.arange(LENGTH), torch.arange(LENGTH) // BLOCK] = value
    return p


def own_index(shift: int = 0) -> Tensor:
    return ((torch.arange(LENGTH) // BLOCK + shift) % (LENGTH // BLOCK)).view(1, 1, -1, 1).expand(BATCH, HEADS, -1, -1)


def group_sum(p: Tensor, value: float) -> Tensor:
    return p.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1) + OWN * value


FORCED: dict[str, Callable[[Tensor], Tensor]] = {
    "added": lambda p: p + OWN * 1e9,
    "added as a number": lambda p: p + OWN.to(p.dtype) * 2.0,
    "added as an integer": lambda p: p + F.one_hot(torch.arange(LENGTH) // BLOCK, LENGTH // BLOCK) * 10,
    "filled": lambda p: p.masked_fill(OWN, 2.0),
    "filled with infinity": lambda p: p.masked_fill(OWN, INF),
    "infinity added": lambda p: p + torch.where(OWN, INF, 0.0),
    "scattered": lambda p: p.scatter(-1, own_index(), 2.0),
    "stored": lambda p: stored(p, 2.0),
    "the larger": lambda p: torch.maximum(p, OWN * 3.0),
    "sum of a group": lambda p: group_sum(p, 3.0),
    "mean of heads": lambda p: p.mean(1, keepdim=True).expand_as(p).masked_fill(OWN, 1.5),
    "mapped": lambda p: p @ torch.eye(LENGTH // BLOCK) + OWN * 1e3,
    "later ones lowered": lambda p: p + 1e3 * OWN - 1e3 * (torch.arange(LENGTH // BLOCK) * BLOCK > torch.arange(LENGTH)[:, None]),
}
NOT_FORCED: dict[str, Callable[[Tensor], Tensor]] = {
    "a tie": lambda p: p.masked_fill(OWN, 1.0),
    "too little": lambda p: p + OWN * 0.5,
    "less than a group": lambda p: group_sum(p, 1.0),
    "another block": lambda p: p.scatter(-1, own_index(1), 2.0),
    "lowered": lambda p: p - OWN * 2.0,
    "scaled up": lambda p: p * 3.0 + OWN * 2.0,
    "of unknown size": lambda p: p / p.mean() + OWN * 1e9,
}


@pytest.mark.parametrize("name", FORCED)
def test_a_raised_score_is_a_picked_block(name: str) -> None:
    report = compiled_like_eager(partial(attend, force=FORCED[name]), qkv())
    (site,) = (s for s in report.sites if s.role == "selected")  # p @ map is a site as well
    assert site.verdict is Verdict.REWRITTEN and "empty_rows" not in site.parameters


@pytest.mark.parametrize("name", NOT_FORCED)
def test_what_may_lose_is_not_taken_for_picked(name: str) -> None:
    report = compiled_like_eager(partial(attend, force=NOT_FORCED[name]), qkv())
    assert_rewritten(report, "selected")
    assert only_site(report).parameters["empty_rows"] == "nan"


@pytest.mark.parametrize("force", ["filled with infinity", "filled", "added"])
def test_scores_that_are_nan_outrank_everything(force: str) -> None:
    """The first queries see no compressed key: their scores are NaN, and so is what they attend to."""
    report = compiled_like_eager(partial(attend, force=FORCED[force], zero=False), qkv())
    assert_rewritten(report, "selected")
    assert only_site(report).parameters["empty_rows"] == "nan"


def test_a_finite_fill_leaves_no_nan() -> None:
    report = compiled_like_eager(partial(attend, force=FORCED["filled"], fill=-1e9, zero=False), qkv())
    assert_rewritten(report, "selected")
    assert "empty_rows" not in only_site(report).parameters
