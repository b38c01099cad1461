"""The ``fsa`` command."""

from __future__ import annotations

import importlib.metadata

import pytest

from fsa_compile import cli, registry


def test_doctor_finds_a_sound_installation_sound(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "FAULT" not in out
    for line in ("ok     torch ", "ok     entry point ", "ok     ops on the CPU  3 ops, forward and backward"):
        assert line in out


def test_doctor_reports_an_op_that_computes_something_else(capsys, monkeypatch):
    from fsa_compile import ops

    whole = ops.sliding_window_attention
    monkeypatch.setattr(ops, "sliding_window_attention", lambda *args, window: whole(*args, window=window - 40))
    assert cli.main(["doctor"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAULT")]
    assert "ops on the CPU" in line and "sliding_window_attention" in line


@pytest.mark.parametrize("copies", [0, 2])
def test_doctor_reports_a_wrong_registration(capsys, monkeypatch, copies):
    entry_point = importlib.metadata.EntryPoint("fsa", "fsa_compile.backend:fsa", "torch_dynamo_backends")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **kwargs: [entry_point] * copies)
    assert cli.main(["doctor"]) == 1
    assert "FAULT  entry point" in capsys.readouterr().out


def test_triton_is_optional_and_torch_is_not(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = {finding.what: finding.ok for finding in cli.examine()}
    assert findings["triton"] is None and findings["torch"] is False


def test_a_wrong_command_prints_the_right_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["docter"])
    assert "doctor" in capsys.readouterr().err


def test_patterns_lists_the_registry_in_order(capsys):
    class Mine(registry.Pattern):
        name = "mine"

    with registry.override(Mine(), disable=("selected",)):
        assert cli.main(["patterns"]) == 0
        expected = list(registry.names())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == expected
    assert expected[0] == "mine" and "selected" not in expected
    assert lines[0].endswith("rewritten") and any(line.startswith("causal") and "left to the inner" in line for line in lines)
