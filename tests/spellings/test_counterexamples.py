"""The counterexample of a refused window tells the truth: the model does, or does not, let that query see that key.

Asked of the model itself: whether another value in that place changes that row of the output. In "chunk_and_look_back" the index
of a key in its window is another number than its position.
"""

from __future__ import annotations

import pytest
import torch

from fsa_compile.report import ReasonKind

from .spelling import BATCH, GROUP, LENGTH
from .test_spellings import PAIRS, SEED, compiled

REFUSED = (("band", "sees the future"), ("chunk_and_look_back", "sees the future"))
NEAR = [(s, m) for s, m in PAIRS if (s.name, m.name) in REFUSED]


@pytest.mark.parametrize("spelling, mutant", NEAR, ids=[s.name for s, _ in NEAR])
def test_the_model_does_what_the_counterexample_says(spelling, mutant) -> None:
    fn, inputs = problem = spelling.make(SEED, mutant)
    _, report = compiled(problem)
    (site,) = report.sites
    point = site.counterexample
    assert point is not None and site.reason is not None and site.reason.kind is ReasonKind.MASK
    q, k, v = (t.detach() for t in inputs)
    assert 0 <= point.query < LENGTH and 0 <= point.key < LENGTH and 0 <= point.batch < BATCH
    other = v.clone()
    other[point.batch, point.head // GROUP, point.key] += 1.0
    row = (point.batch, point.head, point.query)
    changed = not torch.equal(fn(q, k, other)[row], fn(q, k, v)[row])
    assert changed is point.model_sees, str(point)
