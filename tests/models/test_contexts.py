"""The models under everything that surrounds a training or inference step; each test expects every branch to be rewritten.

`aot_eager` is the inner compiler. Where a test compiles more than one graph it uses the example layer, whose graph is a third
of the others'; the layers of the public models take their turn where their own code could make the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile.report import Verdict

from .harness import OPTIONS, Subject, assert_as_exact, assert_same, by_module, compare, compile_model, run, run_baseline, subject
from .subjects import LENGTH, dense_nsa, hidden, lucidrains_layer, minimax_m3, tokens

ROLES = ["compressed", "selected", "sliding_window"]
Maker = Callable[..., Subject]
both_layers = pytest.mark.parametrize("make", [lucidrains_layer, dense_nsa], ids=["lucidrains", "dense"])


def roles(report: fsa_compile.Report) -> list[str]:
    """The sorted roles of what was rewritten."""
    return sorted(role for found in by_module(report).values() for role in found)


class Autocast(nn.Module):
    """A model under autocast, as part of what is compiled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class Checkpointed(nn.Module):
    """A model that is computed again in backward instead of being kept."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


@both_layers
def test_autocast_inside_the_model(make: Maker) -> None:
    """Matmuls run in bfloat16 and softmaxes in float32: the error against float32 stays within 1.5 times the baseline's."""
    plain = make()
    case = subject(Autocast(plain.model), *plain.inputs)
    exact = {name.replace("gradient of ", "gradient of model.", name.count("gradient of input") == 0): x for name, x in run(plain).items()}
    got = run(case, compile_model(case.model))
    assert roles(fsa_compile.last_report()) == ROLES
    assert_as_exact(got, run_baseline(case), exact)


def test_autocast_around_the_call() -> None:
    case = dense_nsa()
    exact = run(case)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(case, compile_model(case.model))
        assert roles(fsa_compile.last_report()) == ROLES
        baseline = run_baseline(case)
    assert got["output"] is not None and got["output"].dtype == torch.bfloat16
    assert_as_exact(got, baseline, exact)


@both_layers
def test_no_grad(make: Maker) -> None:
    case = make()
    with torch.no_grad():
        got = compile_model(case.model)(*case.inputs)
        want = case.model(*case.inputs)
    assert roles(fsa_compile.last_report()) == ROLES
    assert not got.requires_grad
    assert_same({"output": got}, {"output": want})


def test_inference_mode() -> None:
    case = dense_nsa()
    with torch.inference_mode():
        got = compile_model(case.model)(*case.inputs)
        want = case.model(*case.inputs)
    assert roles(fsa_compile.last_report()) == ROLES
    assert_same({"output": got}, {"output": want})


@both_layers
def test_checkpoint(make: Maker) -> None:
    """The body of a checkpoint is a graph of its own, and is rewritten in place so that it is still computed again."""
    plain = make()
    trial = compare(subject(Checkpointed(plain.model), *plain.inputs))
    assert roles(trial.report) == ROLES
    root, *nested = trial.report.graphs
    assert not root.sites and any(len(graph.sites) == 3 for graph in nested)
    assert_same(trial.compiled, trial.eager)


def test_eval_mode() -> None:
    case = minimax_m3("sdpa")
    case.model.eval()
    trial = compare(case)
    assert roles(trial.report) == ["selected", "selected"]
    assert_same(trial.compiled, trial.eager)


@both_layers
def test_batch_of_one(make: Maker) -> None:
    trial = compare(make(batch=1))
    assert roles(trial.report) == ROLES
    assert_same(trial.compiled, trial.eager)


@both_layers
def test_a_length_that_is_no_multiple_of_the_block(make: Maker) -> None:
    trial = compare(make(n=LENGTH - 11))
    assert roles(trial.report) == ROLES
    assert_same(trial.compiled, trial.eager)


def test_minimax_at_a_length_that_is_no_multiple_of_the_block() -> None:
    trial = compare(minimax_m3("eager", n=LENGTH - 11))
    assert roles(trial.report) == ["selected", "selected"]
    assert_same(trial.compiled, trial.eager)


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Yields how many graphs Dynamo has captured since."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]


def lengths_of(model: nn.Module, make_input: Callable[[int], Tensor], like: Subject, lengths: tuple[int, ...]) -> list[Subject]:
    """The same model at other lengths."""
    return [Subject(model, (make_input(n),), like.keywords, like.output) for n in lengths]


@pytest.mark.parametrize("name", ["lucidrains", "dense", "minimax"])
def test_dynamic_length_recompiles_no_more_than_without_us(name: str) -> None:
    """The second length makes Dynamo trace a symbolic one, which the proofs must take; a third may need no graph at all."""
    case = {"lucidrains": lucidrains_layer, "dense": dense_nsa, "minimax": lambda: minimax_m3("sdpa")}[name]()
    expected = ["selected", "selected"] if name == "minimax" else ROLES
    cases = lengths_of(case.model, tokens if name == "minimax" else hidden, case, (256, 192, 320))
    with counting() as graphs:
        compiled = compile_model(case.model)
        for each in cases:
            assert_same(run(each, compiled), run(each))
        ours = graphs()
    report = fsa_compile.last_report()
    with counting() as graphs:
        baseline = torch.compile(case.model, backend="aot_eager", fullgraph=True)
        for each in cases:
            run(each, baseline)
        theirs = graphs()
    assert len(report.graphs) == ours <= theirs
    assert ours < len(cases) or name == "lucidrains"  # lucidrains computes block counts that specialise the length
    for graph in report.graphs:
        assert sorted(s.role for s in graph.sites if s.verdict is Verdict.REWRITTEN) == expected, str(report)


def test_a_mark_on_the_length_compiles_once() -> None:
    case = dense_nsa()
    (x,) = case.inputs
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="fsa", fullgraph=True, options=dict(OPTIONS))
    with torch.no_grad():
        for n in (256, 160, 96):
            y = x if n == 256 else hidden(n)
            assert_same({"output": compiled(y)}, {"output": case.model(y)})
    report = fsa_compile.last_report()
    assert len(report.graphs) == 1 and roles(report) == ROLES
