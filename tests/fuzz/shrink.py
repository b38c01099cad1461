"""Make a failing model plain: put back every decision that the failure does not need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fuzz.choices import from_trail, Option
from fuzz.model import generate, Model

Fails = Callable[[Model], bool]


def shrink(trail: Mapping[str, Option], fails: Fails, mutant: str | None = None) -> Model:
    """The plainest model found that still fails: greedy, groups of decisions first and then one by one.

    Args:
        trail: Decisions of a model that fails.
        fails: Says whether a model still does.
        mutant: The slip to keep in it.
    """
    best = generate(from_trail(trail), mutant)
    size = max(1, len(best.trail) // 2)
    while size:
        names = [name for name in best.trail if best.trail[name] != generate(from_trail(without(best, [name]))).trail.get(name)]
        for start in range(0, len(names), size):
            candidate = generate(from_trail(without(best, names[start : start + size])), mutant)
            if candidate.trail != best.trail and (mutant is None or candidate.mutant_made) and fails(candidate):
                best = candidate
        size //= 2
    return best


def without(model: Model, names: list[str]) -> dict[str, Option]:
    return {name: option for name, option in model.trail.items() if name not in names}
