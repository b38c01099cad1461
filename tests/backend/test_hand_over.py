"""What reaches the inner compiler: the graph, the mode, Inductor's options, the cache salt."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from fsa_compile import backend, last_report
from fsa_compile.backend import CacheSalt, fsa, hash_sources


@pytest.fixture
def inductor(monkeypatch):
    """Stands for Inductor: records the configuration that it is called with, and runs the graph eagerly."""
    seen = []

    def compile_fx(gm, example_inputs, *, config_patches, **kwargs):
        seen.append((dict(config_patches), kwargs))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


def model(x):
    return (x * 2).relu()


X = torch.linspace(-1, 1, 6)


def without_salt(seen):
    (patches, kwargs), = seen
    assert isinstance(patches.pop("joint_custom_pre_pass"), CacheSalt)
    assert kwargs == {}
    return patches


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_means_what_it_means_for_inductor(pipeline, inductor, mode):
    assert torch.equal(torch.compile(model, backend="fsa", mode=mode)(X), model(X))
    assert without_salt(inductor) == torch._inductor.list_mode_options(mode)


def test_an_unknown_mode_is_an_error_that_lists_the_modes(pipeline, inductor):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="max-autotune-no-cudagraphs"):
        torch.compile(model, backend="fsa", mode="fastest")(X)


def test_inductors_options_are_passed_on(pipeline, inductor):
    options = {"max-autotune": True, "triton.cudagraphs": False, "profit": "always"}
    torch.compile(model, backend="fsa", options=options)(X)
    assert without_salt(inductor) == {"max_autotune": True, "triton.cudagraphs": False}
    assert pipeline.calls[0][1].profit == "always"


def test_a_wrong_type_for_inductors_option_is_inductors_error(pipeline, inductor):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="max_autotune, got str should be bool"):
        torch.compile(model, backend="fsa", options={"max_autotune": "yes"})(X)


def test_config_patches_win(pipeline, inductor):
    gm = torch.fx.symbolic_trace(model)
    fsa(gm, [X], mode="max-autotune", config_patches={"max_autotune": False}, ignore_shape_env=True)
    (patches, kwargs), = inductor
    assert patches["max_autotune"] is False and patches["triton.cudagraphs"] is True
    assert kwargs == {"ignore_shape_env": True}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_other_inner_compilers(pipeline, inductor, inner, caplog):
    x = X.clone().requires_grad_()
    out = torch.compile(model, backend="fsa", options={"inner": inner})(x)
    out.sum().backward()
    assert torch.equal(out, model(X)) and torch.equal(x.grad, torch.tensor([0.0, 0, 0, 2, 2, 2]))
    assert inductor == [] and len(pipeline.calls) == 1
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [], "torch warns about arguments that its eager backends do not take"


def test_inductors_options_without_inductor_are_noted(pipeline):
    torch.compile(model, backend="fsa", options={"inner": "eager", "max_autotune": True})(X)
    assert last_report().notes == ("Inductor's options have no effect with inner='eager': max_autotune",)


def test_the_rewritten_graph_is_what_runs(pipeline):
    def triple(gm):
        (mul,) = (node for node in gm.graph.nodes if node.target is operator.mul)
        mul.update_arg(1, 3)
        gm.recompile()

    pipeline.action = triple
    assert torch.equal(torch.compile(model, backend="fsa", options={"inner": "aot_eager"})(X), (X * 3).relu())


def test_dynamic_shapes_compile_once(pipeline):
    compiled = torch.compile(model, backend="fsa", dynamic=True, options={"inner": "aot_eager"})
    for n in (5, 6, 9):
        x = torch.linspace(-1, 1, n)
        assert torch.equal(compiled(x), model(x))
    assert len(pipeline.calls) == 1


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(lambda x: (x @ x.T).softmax(-1), x, use_reentrant=False)


def under_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.T


def without_gradient(x):
    with torch.no_grad():
        weight = x.softmax(-1)
    return weight * x


@pytest.mark.parametrize("function", [checkpointed, under_autocast, without_gradient])
def test_contexts_survive(pipeline, function):
    """A retraced graph would lose each of these; the Dynamo graph that is handed over keeps them."""
    results = []
    for run in (function, torch.compile(function, backend="fsa", fullgraph=True, options={"inner": "aot_eager"})):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = run(x)
        out.float().square().sum().backward()
        results.append((out.detach(), x.grad))
    (want, want_gradient), (got, gradient) = results
    assert got.dtype == want.dtype
    # The same kernels in the same order, but AOTAutograd may group a backward's sums in another way.
    torch.testing.assert_close((got, gradient), (want, want_gradient), rtol=1e-6, atol=1e-6)


def test_fsa_disable_hands_over_untouched(pipeline, inductor, monkeypatch):
    monkeypatch.setenv("FSA_DISABLE", "1")
    out = torch.compile(model, backend="fsa", mode="max-autotune")(X)
    assert torch.equal(out, model(X)) and pipeline.calls == []
    assert without_salt(inductor) == torch._inductor.list_mode_options("max-autotune")
    report = last_report()
    assert report.notes == ("FSA_DISABLE is set: every graph went to the inner compiler untouched",)
    assert [(g.nodes, g.sites) for g in report.graphs] == [(2, ())]


def test_one_line_is_logged_and_nothing_is_printed(pipeline, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="fsa_compile"):
        torch.compile(model, backend="fsa", options={"inner": "eager"})(X)
    assert [r.getMessage() for r in caplog.records] == ["graph 0: 1 of 1 attention sites rewritten (selected)"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("by", ["option", "environment"])
def test_the_report_is_printed_to_stderr_on_request(pipeline, capsys, monkeypatch, by):
    options = {"inner": "eager"}
    if by == "option":
        options["report"] = "summary"
    else:
        monkeypatch.setenv("FSA_REPORT", "summary")
    torch.compile(model, backend="fsa", options=options)(X)
    out, err = capsys.readouterr()
    assert out == "" and "1 of 1 attention site rewritten" in err and "model.py:1" in err


class TheirPass(CustomGraphPass):
    def __init__(self, uuid):
        self._uuid, self.ran = uuid, 0

    def __call__(self, graph):
        self.ran += 1

    def uuid(self):
        return self._uuid


def test_the_salt_keeps_the_users_pass(pipeline, inductor):
    theirs = TheirPass("theirs")
    torch.compile(model, backend="fsa", options={"joint_custom_pre_pass": theirs})(X)
    (patches, _), = inductor
    salt = patches["joint_custom_pre_pass"]
    salt(torch.fx.Graph())
    assert theirs.ran == 1
    assert salt.uuid() == (backend.kernel_hash(), "theirs")
    assert CacheSalt().uuid() == (backend.kernel_hash(),)
    assert CacheSalt([theirs, TheirPass("b")]).uuid()[1:] == ("theirs", "b")


def test_the_salt_keeps_a_pass_from_inductors_global_configuration(pipeline, inductor):
    theirs = TheirPass("global")
    with torch._inductor.config.patch(joint_custom_pre_pass=theirs):
        torch.compile(model, backend="fsa")(X)
    assert inductor[0][0]["joint_custom_pre_pass"].theirs == (theirs,)


@pytest.mark.parametrize("theirs", [TheirPass(None), lambda graph: None])
def test_a_pass_without_an_identity_turns_caching_off_as_it_does_for_inductor(theirs):
    assert CacheSalt(theirs).uuid() is None


def test_the_hash_follows_every_kernel_source(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "ops.py").write_text("a = 1\n")
    (tmp_path / "triton" / "forward.py").write_text("b = 1\n")
    hashes = [hash_sources(tmp_path), hash_sources(tmp_path)]
    (tmp_path / "notes.txt").write_text("not a source\n")
    hashes.append(hash_sources(tmp_path))
    assert len(set(hashes)) == 1
    (tmp_path / "triton" / "forward.py").write_text("b = 2\n")
    hashes.append(hash_sources(tmp_path))
    (tmp_path / "ops.py").rename(tmp_path / "op.py")
    hashes.append(hash_sources(tmp_path))
    assert len(set(hashes)) == 3


@pytest.mark.inductor
def test_a_changed_backward_is_not_taken_from_the_cache(pipeline, monkeypatch):
    """The trap that the salt is there for: AOTAutograd's cache knows a custom op by its name alone."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    factor = 2.0
    double = torch.library.custom_op("fsa_test::double", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor")
    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, grad: grad * factor)

    def gradient():
        torch._dynamo.reset()
        counters.clear()
        x = torch.ones(4, requires_grad=True)
        torch.compile(lambda x: double(x), backend="fsa")(x).sum().backward()
        return x.grad[0].item(), counters["aot_autograd"]["autograd_cache_hit"]

    with fresh_cache():
        monkeypatch.setattr(backend, "kernel_hash", lambda: "version 1")
        assert gradient() == (2.0, 0)
        factor = 3.0
        assert gradient() == (2.0, 1), "the trap is gone: the salt may go too"
        monkeypatch.setattr(backend, "kernel_hash", lambda: "version 2")
        assert gradient() == (3.0, 0)


@pytest.mark.inductor
def test_inductor_itself(pipeline):
    """The one test of this file that runs the real code generator."""
    x = X.clone().requires_grad_()
    out = torch.compile(model, backend="fsa", options={"epilogue_fusion": False})(x)
    out.sum().backward()
    torch.testing.assert_close(out, model(X))
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 0, 2, 2, 2]))
