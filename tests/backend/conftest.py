"""A backend under test without the analysis: `pipeline` is replaced by a fake whose behaviour each test sets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch

from fsa_compile import backend
from fsa_compile.journal import Journal
from fsa_compile.options import Options
from fsa_compile.report import GraphReport, Site, Verdict


def count(gm: torch.fx.GraphModule) -> int:
    return sum(node.op in ("call_function", "call_method", "call_module") for node in gm.graph.nodes)


@dataclass
class FakePipeline:
    """Reports one site per graph and records how it was called; `action` may change the graph or fail."""

    action: Callable[[torch.fx.GraphModule], None] = lambda gm: None
    calls: list[tuple[str, Options, bool]] = field(default_factory=list)

    def analyse_and_rewrite(
        self, gm: torch.fx.GraphModule, options: Options, *, name: str, rewrite: bool = True, **_: object
    ) -> tuple[GraphReport, ...]:
        self.calls.append((name, options, rewrite))
        self.action(gm)
        return (GraphReport(name, nodes=count(gm), sites=(Site("selected", Verdict.REWRITTEN, "model.py:1"),)),)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    module = ModuleType("fsa_compile.passes.pipeline")
    module.analyse_and_rewrite = fake.analyse_and_rewrite
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code, no report and no setting from another test."""
    monkeypatch.delenv("FSA_REPORT", raising=False)
    monkeypatch.delenv("FSA_DISABLE", raising=False)
    monkeypatch.delenv("FSA_DIFFERENTIAL", raising=False)
    monkeypatch.setattr(backend, "_journal", Journal())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
