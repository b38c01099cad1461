"""`explain`: analysis only, and nothing of the user's is left changed."""

from __future__ import annotations

import inspect
import random
from traceback import FrameSummary
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from fsa_compile import explain, last_report, Report
from fsa_compile.graph_breaks import describe
from fsa_compile.passes.dynamo_graph import label_of


class Model(torch.nn.Module):
    """Everything that a forward pass can disturb: random numbers, a buffer, a buffer that is replaced, gradients."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        x = torch.nn.functional.dropout(self.linear(x), 0.5, self.training)
        return self.norm(x)


def test_it_analyses_and_does_not_rewrite(pipeline):
    report = explain(Model(), torch.ones(3, 4))
    assert [rewrite for _, _, rewrite in pipeline.calls] == [False]
    assert report.rewritten == 1 and [g.name for g in report.graphs] == ["graph 0"]
    assert last_report() == Report(), "nothing was compiled"


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(pipeline, training):
    model = Model().train(training)
    x = torch.randn(3, 4, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = model.calls
    states = torch.get_rng_state(), random.getstate()
    explain(model, x)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.calls is calls, "a buffer that forward replaced is the user's tensor again"
    assert model.training is training
    assert x.grad is None and all(p.grad is None for p in model.parameters())


def test_it_is_put_back_even_if_the_model_raises(pipeline):
    model = Model()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        explain(model, torch.ones(3, 5))
    assert model.calls == 0 and torch.equal(torch.get_rng_state(), state)


def test_graph_breaks_are_notes_with_the_users_line(pipeline):
    def broken(x):
        x = x.sin()
        print(end="")
        return x.cos()

    report = explain(broken, torch.ones(3))
    assert [g.name for g in report.graphs] == ["graph 0", "graph 1"]
    (note,) = report.notes
    line = broken.__code__.co_firstlineno + 2
    assert note.startswith("graph break:") and f"(test_explain.py:{line})" in note


def test_grad_mode_is_the_callers(pipeline):
    modes = []
    pipeline.action = lambda gm: modes.append(torch.is_grad_enabled())
    explain(Model(), torch.ones(3, 4))
    with torch.no_grad():
        explain(Model(), torch.ones(3, 4))
    assert modes == [True, False]


def test_compiled_code_and_shape_history_stay_as_they_were(pipeline):
    """A model seen with other shapes while explaining must not become dynamic, nor recompile, nor use up its limit."""
    model = Model().eval()
    compiled = torch.compile(model, backend="fsa", options={"inner": "eager"})
    batches = []
    pipeline.action = lambda gm: batches.append([n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"])
    # torch without isolated caches counts explanations too.
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    with torch._dynamo.config.patch(recompile_limit=2 if isolated else 8, fail_on_recompile_limit_hit=True):
        for n in (2, 3, 4, 5):
            explain(compiled, torch.ones(n, 4))
        compiled(torch.ones(6, 4))
        explain(model, torch.ones(7, 4))
        compiled(torch.ones(6, 4))
    assert [rewrite for _, _, rewrite in pipeline.calls] == [False] * 4 + [True, False], "the second call needed no compilation"
    assert [g.name for g in last_report().graphs] == ["graph 0"]
    static = [not any(isinstance(value, torch.SymInt) for value in batch) for batch in batches]
    assert static == [True] * 5 + [False], "only the user's own compilation counts: after it, another shape is dynamic"


@pytest.mark.parametrize("how", ["wrapped", "in place", "function", "method"])
def test_compiled_callables_are_unwrapped(pipeline, how):
    model = Model()
    target = model
    if how == "wrapped":
        target = torch.compile(model, backend="fsa", options={"inner": "eager"})
    elif how == "in place":
        model.compile(backend="fsa", options={"inner": "eager"})
    elif how == "function":
        target = torch.compile(lambda x: model(x), backend="fsa", options={"inner": "eager"})
    else:
        target = model.forward
    assert explain(target, torch.ones(3, 4)).rewritten == 1
    assert [rewrite for _, _, rewrite in pipeline.calls] == [False]
    assert (model._compiled_call_impl is not None) == (how == "in place")


def test_a_function_without_tensors_has_no_graph(pipeline):
    assert explain(lambda: 3) == Report(notes=("Dynamo captured no graph",))


def item_in_a_loop(x, lengths):
    parts = []
    for k in range(2):
        n = lengths[k].item()
        parts.append(torch.softmax(x[:n] @ x[:n].mT, -1) @ x[:n])
    return torch.cat(parts)


def print_in_a_loop(x):
    for _ in range(2):
        x = torch.softmax(x @ x.mT, -1) @ x
        print(end="")
    return x


def test_a_break_inside_of_a_loop_is_named():
    """Dynamo gives up such a function and says nothing; `explain` finds out why."""
    (note,) = explain(item_in_a_loop, torch.randn(8, 4), torch.tensor([3, 4])).notes
    assert note.startswith("Dynamo captured no graph: ") and ("fullgraph=True" in note or "Python int" in note)
    (note,) = explain(print_in_a_loop, torch.randn(8, 4)).notes
    line = print_in_a_loop.__code__.co_firstlineno + 3
    assert f"(test_explain.py:{line}); move printing, logging and warnings out of the model" in note


def test_a_break_inside_of_torch_is_told_at_the_users_line():
    """As of the warning in ``create_block_mask(..., _compile=True)``."""
    stack = [FrameSummary("/home/me/model.py", 7, "forward"), FrameSummary(flex_attention.__file__, 1912, "create_block_mask")]
    assert describe("Attempted to call warn", stack) == (
        "Attempted to call warn (model.py:7, in flex_attention.py:1912); move printing, logging and warnings out of the model"
    )


def test_breaks_come_with_advice():
    """Each kind of break that real models have, in Dynamo's own words."""

    def branch(x):
        return torch.softmax(x @ x.mT if x.sum() > 0 else x, -1) @ x

    def chosen(x):
        return torch.softmax(x[x.sum(-1) > 0] @ x.mT, -1) @ x

    x = torch.randn(8, 4)
    for model, inputs, advice in (
        (branch, (x @ x.mT,), "decide with torch.where"),
        (chosen, (x,), "keep the size fixed"),
    ):
        notes = explain(model, *inputs).notes
        assert any("test_explain.py:" in note and advice in note for note in notes), notes


def test_a_value_from_before_a_break_has_no_name():
    """Dynamo calls it ``___stack0``; the user never wrote that."""
    n = torch.fx.Graph().placeholder("l_stack0_2_")
    n.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name="L['___stack0'][2]"))
    assert label_of(n) == "a value from before the graph break"
