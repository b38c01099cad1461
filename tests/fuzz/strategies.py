"""The generator driven by Hypothesis. What fails is printed with its decisions; `benchmarks/fuzz.py --replay ... --shrink` makes
it plain, which takes minutes that a test run does not have."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

from fuzz.choices import Option
from fuzz.judge import judge, judge_mutant
from fuzz.model import generate, Model


MORE_STATIC = 8
"""With these, two models in sixteen have dynamic sizes. They take four times as long: the long run has twice as many."""


@st.composite
def models_with_slips(draw: st.DrawFn, branches: tuple[str, ...]) -> tuple[Model, str]:
    """A model of one of these sets of branches, and the name of a mutant of it."""

    def answer(name: str, options: tuple[Option, ...]) -> Option:
        if name == "branches":
            options = branches
        elif name == "dynamic":
            options = (*options, *("static",) * MORE_STATIC)
        return draw(st.sampled_from(options))

    model = generate(answer)
    return model, draw(st.sampled_from(model.slips))


def fuzz(branches: tuple[str, ...], chunk: int, models: int) -> None:
    """Judge `models` models and a mutant of each; the same ones whenever `chunk` is the same. The first that fails ends the chunk."""
    run: Callable[[], None] = seed(chunk)(
        settings(
            max_examples=models,
            database=None,
            deadline=None,
            print_blob=False,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )(given(models_with_slips(branches))(_judge_both))
    )
    run()


def _judge_both(pair: tuple[Model, str]) -> None:
    model, slip = pair
    for judged in (lambda: judge(model), lambda: judge_mutant(model, slip)):
        judgement = judged()
        if judgement.fault:  # no assert, which would print everything once more
            raise AssertionError(str(judgement))
