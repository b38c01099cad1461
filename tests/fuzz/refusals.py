"""Spellings that are refused today although the op computes them: what is still owed, as narrow as it can be told.

A row names decisions of the generator. "*" stands for any branch. A model may be refused at a branch where a row holds, and
nowhere else; and each row's example, the plainest model with these decisions, must still be refused, so a row goes when its
spelling is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fuzz.choices import Option
from fuzz.model import Model


@dataclass(frozen=True)
class Refusal:
    """One row.

    Args:
        choices: The decisions, by name.
        branch: The branch that is refused; in the example this is where "*" stands.
        reason: How the report's reason begins, "kind: text".
    """

    choices: Mapping[str, Option | tuple[Option, ...]]
    branch: str
    reason: str

    def example(self) -> dict[str, Option]:
        """The trail of the plainest such model."""
        trail: dict[str, Option] = {"branches": self.branch}
        for name, option in self.choices.items():
            trail[name.replace("*", self.branch)] = option[0] if isinstance(option, tuple) else option
        return trail

    def holds(self, model: Model, branch: str) -> bool:
        """Whether `branch` of `model` takes these decisions."""
        if branch != self.branch and not any(name.startswith("*.") for name in self.choices):
            return False

        def taken(name: str, option: Option | tuple[Option, ...]) -> bool:
            actual = model.trail.get(name.replace("*", branch))
            return actual in option if isinstance(option, tuple) else actual == option

        return all(taken(name, option) for name, option in self.choices.items())


REFUSALS: tuple[Refusal, ...] = (
    # Codes whose step is symbolic are not divided by it.
    Refusal({"selected.membership": "isin", "dynamic": ("mark", "all")}, "selected", "mask: the mask depends on data"),
    # The table of rows that are gathered is as long as all blocks of all heads, and no guard says what that has to do with keys.
    Refusal(
        {"selected.form": "gather", "selected.gather": "embedding", "dynamic": ("mark", "all")},
        "selected",
        "operands: the keys that the logits see",
    ),
    # The score of an entry is compared where the entries of all rows stand in one pool: no tensor of the model holds the result.
    Refusal(
        {
            "selected.membership": "isin",
            "selected.padding": ("sentinel", "minus"),
            "selected.unused": "score",
            "selected.scores": ("keys_max", "pooled"),
        },
        "selected",
        "mask: the block list holds dot",
    ),
)


def may_refuse(model: Model) -> tuple[str, ...]:
    """The branches of `model` that may be refused."""
    return tuple(branch for branch in model.branches if any(row.holds(model, branch) for row in REFUSALS))
