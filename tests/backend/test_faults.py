"""Faults of ours: the user's graph runs unchanged, the report says so, and strict raises."""

from __future__ import annotations

import operator

import pytest
import torch

from fsa_compile import explain, last_report


def model(x):
    return (x * 2).relu()


X = torch.linspace(-1, 1, 6)


def fail(gm):
    raise KeyError("a fault of ours")


def fail_half_way(gm):
    (mul,) = (node for node in gm.graph.nodes if node.target is operator.mul)
    mul.update_arg(1, 3)
    raise KeyError("a fault of ours")


def test_an_internal_error_leaves_the_graph_as_it_was(pipeline):
    pipeline.action = fail
    x = X.clone().requires_grad_()
    out = torch.compile(model, backend="fsa", fullgraph=True, options={"inner": "aot_eager"})(x)
    out.sum().backward()
    assert torch.equal(out, model(X)) and torch.equal(x.grad, torch.tensor([0.0, 0, 0, 2, 2, 2]))
    (graph,) = last_report().graphs
    assert (graph.name, graph.nodes, graph.sites) == ("graph 0", 2, ())
    assert "internal error" in graph.notes[0] and "KeyError: 'a fault of ours'" in graph.notes[0]
    assert "strict" in graph.notes[1]


def test_strict_raises_it(pipeline):
    pipeline.action = fail
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a fault of ours") as error:
        torch.compile(model, backend="fsa", options={"inner": "aot_eager", "strict": True})(X)
    assert isinstance(error.value.inner_exception, KeyError)


def test_a_graph_that_was_left_half_changed_never_runs(pipeline):
    pipeline.action = fail_half_way
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="failed while changing the graph"):
        torch.compile(model, backend="fsa", options={"inner": "aot_eager"})(X)


def test_a_half_changed_nested_body_is_noticed_too(pipeline):
    def in_the_body(gm):
        bodies = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule) and m is not gm]
        assert len(bodies) == 1
        fail_half_way(bodies[0])

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    pipeline.action = in_the_body
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="failed while changing the graph"):
        torch.compile(checkpointed, backend="fsa", options={"inner": "aot_eager"})(X.clone().requires_grad_())


def test_explain_notes_it_too(pipeline):
    pipeline.action = fail
    assert "internal error" in explain(model, X).graphs[0].notes[0]
