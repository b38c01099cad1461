"""What a generated model and its mutant must do, in one place for the tests and for the long run."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch

from fuzz.check import check, difference, DIFFERENT, eager, Verdict
from fuzz.choices import from_trail
from fuzz.model import generate, Model
from fuzz.refusals import may_refuse

ROLES = {"selected": "selected", "window": "sliding_window", "compressed": "compressed"}
"""What a report calls the branches."""

DRAWS = 4
"""How many draws of the inputs a mutant gets to show that it differs from its parent."""


@dataclass
class Judgement:
    """What happened to one model, or to one mutant.

    Args:
        model: The model.
        verdict: What the compilation did; None if it raised.
        fault: "wrong", "refused", "crash" or "equivalent" (a mutant that differs from its parent in no draw); empty if all is
            as it should be.
        detail: What exactly.
    """

    model: Model
    verdict: Verdict | None = None
    fault: str = ""
    detail: str = ""
    owed: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        slip = f" --slip {self.model.mutant}" if self.model.mutant else ""
        again = f'python benchmarks/fuzz.py --shrink --replay "{dict(self.model.trail)}"{slip}'
        return f"{self.fault}: {self.detail}\n\n{self.model!r}\n\nMade plain by:\n{again}"


def judge(model: Model, seed: int = 0) -> Judgement:
    """A right model is rewritten, every branch of it, and equal to eager. A mutant is equal to its own eager."""
    judgement = Judgement(model, owed=() if model.mutant else may_refuse(model))
    try:
        verdict = judgement.verdict = check(model, seed)
    except Exception as error:  # A crash is a finding like any other, and the long run must go on.
        if crashes_anyway(model, seed, error):
            return judgement
        judgement.fault, judgement.detail = "crash", "".join(traceback.format_exception(error, limit=-8))
        return judgement
    if verdict.wrong:
        judgement.fault, judgement.detail = "wrong", verdict.wrong
    elif not model.mutant and not_as_intended(model, verdict, judgement.owed):
        judgement.fault = "refused"
        judgement.detail = f"rewritten: {', '.join(verdict.roles) or 'nothing'}; " + "; ".join(verdict.reasons)
    return judgement


def crashes_anyway(model: Model, seed: int, error: Exception) -> bool:
    """Whether torch fails in the same way without this package: views of permuted gradients in "aot_eager", for one."""
    try:
        check(model, seed, backend="aot_eager")
    except Exception as other:
        return type(other) is type(error) and str(other) == str(error)
    return False


def not_as_intended(model: Model, verdict: Verdict, owed: tuple[str, ...]) -> bool:
    """Whether a branch that is not owed was left alone, or something was rewritten that is no branch."""
    missing = Counter(ROLES[branch] for branch in model.branches)
    missing.subtract(verdict.roles)
    missing.subtract(Counter({ROLES[branch]: missing[ROLES[branch]] for branch in owed if missing[ROLES[branch]] > 0}))
    return any(missing.values())


def judge_mutant(parent: Model, slip: str) -> Judgement:
    """As `judge`, after making sure that the slip changes an outcome at all."""
    mutant = generate(from_trail(parent.trail), slip)
    for seed in range(DRAWS):
        # In float64, so that no rounding can pass for a difference.
        if difference(eager(parent, seed, dtype=torch.float64), eager(mutant, seed, dtype=torch.float64))[0] >= DIFFERENT:
            return judge(mutant, seed)
    return Judgement(mutant, fault="equivalent", detail=f"{slip} changes nothing in {DRAWS} draws")
