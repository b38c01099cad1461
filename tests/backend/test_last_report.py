"""Which graphs `last_report` holds: one `torch.compile` call is one report."""

from __future__ import annotations

import gc
import json
import threading
import weakref

import pytest
import torch

from fsa_compile import last_report, Report
from fsa_compile.backend import fsa
from fsa_compile.journal import Journal, Session, Trace
from fsa_compile.report import GraphReport

OPTIONS = {"inner": "eager"}


def compiled(model, **kwargs):
    return torch.compile(model, backend="fsa", options=dict(OPTIONS), **kwargs)


def names():
    return [graph.name for graph in last_report().graphs]


def straight(x):
    return x.sin() + 1


def broken(x):
    y = x.sin()
    torch._dynamo.graph_break()
    return helper(y).cos()


def helper(x):
    y = x * 2
    torch._dynamo.graph_break()
    return y + 1


def test_nothing_compiled_is_an_empty_report():
    assert last_report() == Report()


def test_all_graphs_of_a_model_with_graph_breaks(pipeline):
    x = torch.ones(3)
    assert torch.equal(compiled(broken)(x), broken(x))
    # sin | x * 2 | y + 1 (the resumed helper) | cos (the resumed caller): two breaks, in two functions.
    assert names() == ["graph 0", "graph 1", "graph 2", "graph 3"]
    breaks = last_report().notes
    assert len(breaks) == 2 and all("graph break" in line and "test_last_report.py:" in line for line in breaks)


def test_recompilations_are_appended(pipeline):
    model = compiled(broken, dynamic=False)
    model(torch.ones(3))
    first = names()
    model(torch.ones(4))
    assert names()[: len(first)] == first
    assert names()[len(first) :] == [f"graph {i + 4} (recompilation of graph {i})" for i in range(4)]


def test_another_torch_compile_call_starts_another_report(pipeline):
    # Functions of their own, because Dynamo rightly shares compiled code between equal calls on one function.
    first, second = compiled(lambda x: straight(x) * 2), compiled(lambda x: straight(x) * 3)
    first(torch.ones(3))
    second(torch.ones(3))
    assert names() == ["graph 0"]
    first(torch.ones(4, 4))
    assert names() == ["graph 0", "graph 1 (recompilation of graph 0)"], "the first model compiled last, so it is the latest"
    second(torch.ones(3))
    assert len(names()) == 2, "a call that compiles nothing changes nothing"


def test_two_modules_of_one_class_are_two_reports(pipeline):
    """Dynamo counts the second module as a recompilation of the first one's frame; the reports must not."""

    class Model(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = torch.nn.Linear(3, width)

        def forward(self, x):
            return self.linear(x)

    for width in (4, 5):
        compiled(Model(width))(torch.ones(2, 3))
        assert names() == ["graph 0"]


def test_module_compile_in_place(pipeline):
    class Model(torch.nn.Module):
        def forward(self, x):
            return straight(x)

    model = Model()
    model.compile(backend="fsa", options=dict(OPTIONS), dynamic=False)
    model(torch.ones(2, 3))
    model(torch.ones(4, 3))
    assert names() == ["graph 0", "graph 1 (recompilation of graph 0)"]


def test_dynamo_reset_starts_afresh_and_keeps_the_latest_readable(pipeline):
    model = compiled(straight)
    model(torch.ones(3))
    torch._dynamo.reset()
    assert names() == ["graph 0"]
    model(torch.ones(3))
    assert names() == ["graph 0"]


def test_a_direct_call_is_a_report_of_its_own(pipeline):
    for _ in range(2):
        fsa(torch.fx.symbolic_trace(straight), [torch.ones(3)], options=OPTIONS)
        assert names() == ["graph 0"]


def test_a_failed_inner_compilation_leaves_its_report(pipeline, monkeypatch):
    def compile_fx(*args, **kwargs):
        raise RuntimeError("Inductor failed")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Inductor failed"):
        torch.compile(straight, backend="fsa")(torch.ones(3))
    assert names() == ["graph 0"]


def test_json_round_trip(pipeline):
    compiled(broken)(torch.ones(3))
    report = last_report()
    read = json.loads(report.to_json())
    assert read == report.to_dict()
    assert read["rewritten"] == 4 and read["graphs"][0]["sites"][0]["verdict"] == "rewritten"


def test_a_model_that_is_gone_keeps_no_session(pipeline):
    journal = Journal()
    owner = torch.nn.Module()
    kept, gone = journal.session(owner), weakref.ref(owner)
    assert journal.session(owner) is kept
    journal.session(None)
    del owner
    gc.collect()
    assert gone() is None and journal._sessions == {}


def test_a_restarted_compilation_replaces_its_graph():
    session = Session()
    for trace in (Trace(0, 0, 0), Trace(1, 0, 0), Trace(1, 0, 2)):
        session.add(trace, [GraphReport(session.begin(trace))])
    assert [g.name for g in session.report().graphs] == ["graph 0", "graph 1"]


def test_several_graphs_of_one_compilation_are_no_recompilations():
    """DistributedDataParallel's bucketing calls the backend once per bucket."""
    session = Session()
    for _ in range(2):
        session.add(Trace(0, 0, 0), [GraphReport(session.begin(Trace(0, 0, 0)))])
    assert [g.name for g in session.report().graphs] == ["graph 0", "graph 1"]


def test_threads_get_sessions_of_their_own():
    journal = Journal()
    owners = [torch.nn.Module() for _ in range(8)]

    def work(owner):
        for i in range(50):
            session = journal.session(owner)
            session.add(Trace(i, 0, 0), [GraphReport(session.begin(Trace(i, 0, 0)))])

    threads = [threading.Thread(target=work, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for owner in owners:
        assert [g.name for g in journal.session(owner).report().graphs] == [f"graph {i}" for i in range(50)]
    assert len(journal.latest().graphs) == 50


def test_ddp_bucketing_is_noted(pipeline, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(4))  # 1 MiB each

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Model(), bucket_cap_mb=1)
        compiled(model)(torch.ones(2, 512)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    report = last_report()
    assert len(report.graphs) > 1 and [g.name for g in report.graphs] == [f"graph {i}" for i in range(len(report.graphs))]
    assert any("bucketing" in note and "optimize_ddp" in note for note in report.notes)
