"""Options: what is taken, what is passed on to Inductor, and what an error says."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import list_options

from fsa_compile.options import disabled, Options

NAMES = ("selected", "compressed", "sliding_window")


def parse(given, **kwargs):
    return Options.parse(given, pattern_names=lambda: NAMES, **kwargs)


def test_nothing_given_is_the_default():
    assert parse(None) == (Options(), {})
    assert Options() == Options("inductor", False, "off", (), (), "auto", "fused", 2.0)


def test_ours_and_inductors_are_told_apart():
    given = {"inner": "eager", "strict": True, "max-autotune": True, "triton.cudagraphs": True, "only": ["selected"]}
    options, inductor = parse(given)
    assert options == Options(inner="eager", strict=True, only=("selected",))
    assert inductor == {"max_autotune": True, "triton.cudagraphs": True}
    assert set(given) == {"inner", "strict", "max-autotune", "triton.cudagraphs", "only"}, "the user's dictionary is not changed"


def test_no_key_of_ours_hides_one_of_inductors():
    assert not set(Options.__dataclass_fields__) & set(list_options())


@pytest.mark.parametrize(
    "given, says",
    [
        ({"inne": "eager"}, ["'inne'", "did you mean 'inner'", "'proof_seconds'", "list_options"]),
        ({"max_autotun": True}, ["'max_autotun'", "did you mean 'max_autotune'"]),
        ({7: True}, ["unknown option 7"]),
        ({"inner": "inducter"}, ["option 'inner'", "did you mean 'inductor'", "'aot_eager', 'eager', 'inductor'"]),
        ({"inner": ["eager"]}, ["option 'inner'", "['eager']"]),
        ({"report": True}, ["option 'report'", "'full', 'off', 'summary'", "True"]),
        ({"profit": "never"}, ["option 'profit'", "'always', 'auto'", "'never'"]),
        ({"strict": 1}, ["option 'strict'", "True or False", "1"]),
        ({"verify": "yes"}, ["option 'verify'", "True or False", "'yes'"]),
        ({"differential": None}, ["option 'differential'", "True or False", "None"]),
        ({"disable": "selected"}, ["option 'disable'", "list of pattern names", "'selected'"]),
        ({"only": [1]}, ["option 'only'", "list of pattern names"]),
        ({"only": ["slected"]}, ["option 'only'", "'slected'", "did you mean 'selected'", "'compressed'"]),
        ({"disable": ["compresed"]}, ["option 'disable'", "did you mean 'compressed'"]),
        ({"proof_seconds": 0}, ["option 'proof_seconds'", "positive number of seconds", "0"]),
        ({"proof_seconds": float("inf")}, ["option 'proof_seconds'", "inf"]),
        ({"proof_seconds": float("nan")}, ["option 'proof_seconds'", "nan"]),
        ({"proof_seconds": "2"}, ["option 'proof_seconds'", "'2'"]),
        ("inner=eager", ["options must be a dictionary"]),
    ],
)
def test_an_error_names_the_option_and_the_right_values(given, says):
    with pytest.raises(ValueError) as error:
        parse(given)
    assert [part for part in says if part not in str(error.value)] == []


def test_pattern_names_are_only_asked_for_when_needed():
    def unavailable():
        raise AssertionError("asked")

    Options.parse({"inner": "eager", "only": []}, pattern_names=unavailable)
    with pytest.raises(AssertionError, match="asked"):
        Options.parse({"only": ["selected"]}, pattern_names=unavailable)


def test_the_environment_sets_the_default_of_report(monkeypatch):
    monkeypatch.setenv("FSA_REPORT", "full")
    assert parse(None)[0].report == "full"
    assert parse({"report": "off"})[0].report == "off", "what the code says wins"
    monkeypatch.setenv("FSA_REPORT", "loud")
    with pytest.raises(ValueError, match="FSA_REPORT must be one of 'full', 'off', 'summary', got 'loud'"):
        parse(None)


@pytest.mark.parametrize("value, expected", [("", False), ("0", False), ("off", False), ("1", True), ("yes", True)])
def test_disabled_by_environment(monkeypatch, value, expected):
    assert disabled() is False
    monkeypatch.setenv("FSA_DISABLE", value)
    assert disabled() is expected


def test_torch_compile_raises_a_wrong_option_with_our_text(pipeline):
    compiled = torch.compile(torch.relu, backend="fsa", options={"inne": "eager"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'inner'"):
        compiled(torch.ones(2))
    assert pipeline.calls == []


def test_torch_compile_checks_pattern_names_against_the_registry(pipeline):
    compiled = torch.compile(torch.relu, backend="fsa", options={"inner": "eager", "only": ["slected"]})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'selected'"):
        compiled(torch.ones(2))
    compiled = torch.compile(torch.relu, backend="fsa", options={"inner": "eager", "only": ["selected"]})
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2))
    assert pipeline.calls[0][1].only == ("selected",)
