"""Decisions by name: the generator asks, a random source, Hypothesis or a recorded trail answers.

Every decision has a name that is unique in the model ("selected.softmax"). The decisions of one model, its trail, are all that
is needed to write it again. A trail may be partial: what it does not name takes the first, plainest option, so a failure is
described by the few decisions that matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Option = str | int
Answer = Callable[[str, tuple[Option, ...]], Option]


def at_random(seed: int) -> Answer:
    """Answers that are independent and uniform over the listed options (one listed twice is twice as likely)."""
    generator = random.Random(seed)
    return lambda _name, options: generator.choice(options)


def from_trail(trail: Mapping[str, Option]) -> Answer:
    """The answers of a trail, and the first option where it has none (or one that is not on offer here)."""

    def answer(name: str, options: tuple[Option, ...]) -> Option:
        return trail[name] if trail.get(name) in options else options[0]

    return answer


class Source:
    """The text of one model in the making: its lines, the decisions taken, and the places where it can be made wrong.

    Args:
        answer: Takes the decisions.
        mutant: The one slip to make, a name from `slips` of the same model without it; None for a right model.
    """

    def __init__(self, answer: Answer, mutant: str | None = None) -> None:
        self._answer = answer
        self._mutant = mutant
        self._scope: list[str] = []
        self.trail: dict[str, Option] = {}
        self.sizes: dict[str, int] = {}
        self.grad = True
        self._quiet = False
        self.slips: list[str] = []
        self.setup: list[str] = []
        self.body: list[str] = []
        self.inputs: dict[str, str] = {}

    def detached(self, expression: str) -> tuple[str, ...]:
        """The wrong text that differs in the gradient alone, or nothing if the model has none."""
        return (f"{expression}.detach()",) if self.grad else ()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of decisions and slips."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def full(self, name: str) -> str:
        """The name of a decision in the present scope."""
        return ".".join((*self._scope, name))

    def identifier(self) -> str:
        """The present scope, for names of attributes."""
        return "_".join(self._scope)

    def pick(self, name: str, *options: Option) -> Option:
        """One of `options`; the first is the plainest."""
        name = self.full(name)
        assert name not in self.trail, f"two decisions are called {name}"
        self.trail[name] = self._answer(name, options)
        return self.trail[name]

    def slip(self, name: str, right: str, *wrong: str) -> str:
        """`right`, or one of `wrong` if this is the mutant's place. Empty text stands for no code at all."""
        if self._quiet:
            return right
        name = self.full(name)
        for number, text in enumerate(wrong):
            full = name if len(wrong) == 1 else f"{name}:{number + 1}"
            assert full not in self.slips, f"two slips are called {full}"
            self.slips.append(full)
            if self._mutant == full:
                right = text
        return right

    def init(self, line: str) -> None:
        """A line of `__init__`."""
        self.setup.append(line)

    def let(self, name: str, expression: str) -> str:
        """``name = expression`` in `forward`; gives the name back."""
        if name != expression:
            self.body.append(f"{name} = {expression}")
        return name

    @contextmanager
    def redundant(self, yes: bool = True) -> Iterator[None]:
        """No slips in here, if `yes`: what is written changes nothing, right or wrong."""
        before, self._quiet = self._quiet, self._quiet or yes
        yield
        self._quiet = before

    def input(self, name: str, expression: str) -> str:
        """An argument of `forward`, drawn by `expression`; gives the name back."""
        self.inputs[name] = expression
        return name
