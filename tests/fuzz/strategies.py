"""The generator driven by Hypothesis, which shrinks what fails to the fewest and plainest decisions."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

from fuzz.choices import Option
from fuzz.judge import judge, judge_mutant
from fuzz.model import generate, Model


@st.composite
def models_with_slips(draw: st.DrawFn, branches: tuple[str, ...]) -> tuple[Model, str]:
    """A model of one of these sets of branches, and the name of a mutant of it."""

    def answer(name: str, options: tuple[Option, ...]) -> Option:
        return draw(st.sampled_from(branches if name == "branches" else options))

    model = generate(answer)
    return model, draw(st.sampled_from(model.slips))


def fuzz(branches: tuple[str, ...], chunk: int, models: int) -> None:
    """Judge `models` models and a mutant of each; the same ones whenever `chunk` is the same."""
    run: Callable[[], None] = seed(chunk)(
        settings(
            max_examples=models,
            database=None,
            deadline=None,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(given(models_with_slips(branches))(_judge_both))
    )
    run()


def _judge_both(pair: tuple[Model, str]) -> None:
    model, slip = pair
    judgement = judge(model)
    assert not judgement.fault, str(judgement)
    judgement = judge_mutant(model, slip)
    assert not judgement.fault, str(judgement)
