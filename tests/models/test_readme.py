"""The README's example runs, and its test command is the one that continuous integration calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import fsa_compile
from fsa_compile import registry

from .harness import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of that language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_pattern_example() -> None:
    """As printed, except that `aot_eager` stands in for Inductor."""
    (example,) = (code for code in blocks("python") if "register(" in code)
    names: dict[str, Any] = {}
    head, _ = example.split("torch.compile(")
    torch._dynamo.reset()
    with registry.override():  # forgets what the example registers
        exec(head, names)
        compiled = torch.compile(names["attention"], backend="fsa", options=dict(OPTIONS))
        inputs = names["q"], names["k"], names["v"]
        torch.testing.assert_close(compiled(*inputs), names["attention"](*inputs))
    (site,) = fsa_compile.last_report().sites
    assert (site.role, site.verdict) == ("causal_sdpa", "rewritten")
    assert "causal_sdpa" not in registry.names()


def test_continuous_integration_runs_the_tests_as_the_readme_does() -> None:
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if "pytest" in line)
    install, package, tests = command.split(" && ")
    steps = (ROOT / ".ci" / "run").read_text().replace(" -qq", "").replace("--editable", "-e").splitlines()
    assert [step for step in steps if step.startswith("python -m ")] == [install, package, tests]


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)
