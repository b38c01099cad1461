"""Roles of one's own: registered, ordered, replaced, found through entry points; and the built-in ones use nothing else."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fsa_compile
from fsa_compile import registry
from fsa_compile.passes import expr as x
from fsa_compile.passes.expr import Expr
from fsa_compile.passes.form_view import FormView
from fsa_compile.registry import Candidate, Pattern, Tensors, builtin
from fsa_compile.registry import registry as table
from fsa_compile.report import Reason, ReasonKind, Report, Verdict

OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True}
BUILTIN_NAMES = ("causal", "sliding_window", "compressed", "full", "selected")
LENGTH = 32


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    with registry.override():
        yield
    torch._dynamo.reset()


class CausalToSDPA(Pattern):
    """Causal attention as one SDPA call."""

    name = "causal_sdpa"

    def match(self, form: FormView) -> Iterable[Candidate]:
        yield Candidate("causal_sdpa", {}, visible=lambda p: form.causal(p), witnesses=(form.query,))

    def build(self, candidate: Candidate, t: Tensors) -> Any:
        return F.scaled_dot_product_attention(t.q, t.k, t.v, is_causal=True, scale=t.scale, enable_gqa=True)


class Prefix(Pattern):
    """Every query sees the keys before a fixed position: a prompt that all look at."""

    name = "prefix"

    def match(self, form: FormView) -> Iterable[Candidate]:
        if not form.dense or form.data_dependent():
            return
        length = sum(form.sees(0, j) for j in range(form.keys))
        if not 0 < length < form.keys:
            return

        def visible(p: Expr) -> Expr:
            return x.less(p, x.integer(length))

        yield Candidate("prefix", {"length": length}, visible=visible, witnesses=(x.ZERO,))

    def build(self, candidate: Candidate, t: Tensors) -> Any:
        n = candidate.parameters["length"]
        return F.scaled_dot_product_attention(t.q, t.k[:, :, :n], t.v[:, :, :n], scale=t.scale, enable_gqa=True)


def inputs(n: int = LENGTH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, n, 8, generator=generator).requires_grad_() for h in (4, 2, 2))


def attention(mask: Any) -> Any:
    """Grouped-query attention under the mask that ``mask(i, j)`` says."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return (q @ k.mT * 0.3).masked_fill(~mask(i, j), float("-inf")).softmax(-1) @ v

    return fn


causal = attention(lambda i, j: j <= i)
prefix = attention(lambda i, j: (j < 5) & (i >= 0))
sliding = attention(lambda i, j: (j <= i) & (i - j < 8))


def report_of(fn: Any, **options: Any) -> Report:
    """Compiled and eager must agree, forward and gradients; the report is handed back."""
    torch._dynamo.reset()
    leaves = inputs()
    out = torch.compile(fn, backend="fsa", fullgraph=True, options={**OPTIONS, **options})(*leaves)
    want = fn(*leaves)
    torch.testing.assert_close(out, want)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    return fsa_compile.last_report()


def only(report: Report) -> Any:
    (site,) = report.sites
    return site


# ------------------------------------------------------------------------------------------- a fourth role


def test_without_a_pattern_causal_attention_is_left() -> None:
    assert (only(report_of(causal)).role, only(report_of(causal)).verdict) == ("causal", Verdict.LEFT)


def test_registered_role_is_rewritten_and_right() -> None:
    registry.register(CausalToSDPA())
    site = only(report_of(causal))
    assert (site.role, site.verdict) == ("causal_sdpa", Verdict.REWRITTEN)
    assert {p.obligation for p in site.proofs} >= {"visible == causal_sdpa", "every query sees a key"}


def test_registered_role_with_parameters() -> None:
    registry.register(Prefix())
    site = only(report_of(prefix))
    assert (site.role, site.verdict, site.parameters["length"]) == ("prefix", Verdict.REWRITTEN, 5)
    assert site.parameters["heads"] == 4 and site.parameters["kv_heads"] == 2


def test_registered_role_does_not_fire_on_others() -> None:
    registry.register(CausalToSDPA())
    registry.register(Prefix())
    site = only(report_of(sliding))
    assert (site.role, site.parameters["window"]) == ("sliding_window", 8)


def test_role_that_lies_is_refused_with_a_counterexample() -> None:
    """A pattern proposes; what it proposes is proven like every other."""

    class Liar(CausalToSDPA):
        name = "liar"

        def match(self, form: FormView) -> Iterable[Candidate]:
            yield Candidate(
                "liar", {}, visible=lambda p: x.conj(form.causal(p), x.at_least(p, x.integer(3))), witnesses=(form.query,)
            )

    registry.register(Liar())
    site = only(report_of(causal, only=["liar"]))
    assert (site.verdict, site.reason.kind) == (Verdict.REFUSED, ReasonKind.MASK)
    assert site.counterexample.key < 3 and site.counterexample.key <= site.counterexample.query
    assert "liar" in str(site.counterexample)


def test_role_without_log_sum_exp_is_refused_where_rows_are_empty() -> None:
    class Earlier(CausalToSDPA):
        name = "earlier"

        def match(self, form: FormView) -> Iterable[Candidate]:
            yield Candidate("earlier", {}, visible=lambda p: x.less(p, form.query), witnesses=(x.ZERO,))

    registry.register(Earlier())
    torch._dynamo.reset()
    q, k, v = inputs()
    fn = attention(lambda i, j: j < i)
    out = torch.compile(fn, backend="fsa", fullgraph=True, options={**OPTIONS, "only": ["earlier"]})(q, k, v)
    assert torch.equal(out.isnan(), fn(q, k, v).isnan())
    site = only(fsa_compile.last_report())
    assert (site.verdict, site.reason.kind) == (Verdict.REFUSED, ReasonKind.EMPTY_ROWS)


def test_role_decides_where_it_runs_and_pays() -> None:
    class Picky(CausalToSDPA):
        name = "picky"

        def supports(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
            assert device.type == "cpu" and dtype == torch.float32
            return Reason(ReasonKind.SHAPE, "no") if form.queries > 16 else None

        def pays(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
            return Reason(ReasonKind.UNPROFITABLE, "too short")

    registry.register(Picky())
    site = only(report_of(causal, only=["picky"]))
    assert (site.verdict, site.reason.kind, site.reason.text) == (Verdict.REFUSED, ReasonKind.SHAPE, "no")
    for profit, verdict in (("always", Verdict.REWRITTEN), ("auto", Verdict.REFUSED)):
        torch._dynamo.reset()
        torch.compile(causal, backend="fsa", fullgraph=True, options={**OPTIONS, "only": ["picky"], "profit": profit})(*inputs(8))
        assert only(fsa_compile.last_report()).verdict is verdict


def test_role_that_fails_is_an_internal_error_and_the_model_still_runs() -> None:
    class Broken(CausalToSDPA):
        name = "broken"

        def match(self, form: FormView) -> Iterable[Candidate]:
            raise ZeroDivisionError("mine")

    registry.register(Broken())
    site = only(report_of(causal, strict=False))
    assert (site.verdict, site.reason.kind) == (Verdict.REFUSED, ReasonKind.INTERNAL)
    assert "mine" in site.reason.text
    with pytest.raises(Exception, match="mine"):
        report_of(causal)


def test_role_whose_build_fails_leaves_the_graph_as_it_was() -> None:
    class Unbuildable(CausalToSDPA):
        name = "unbuildable"

        def build(self, candidate: Candidate, t: Tensors) -> Any:
            t.q.transpose(1, 2)
            raise NotImplementedError("later")

    registry.register(Unbuildable())
    site = only(report_of(causal, strict=False))
    assert (site.verdict, site.reason.kind) == (Verdict.REFUSED, ReasonKind.INTERNAL)
    with pytest.raises(Exception, match="later"):
        report_of(causal)


# ------------------------------------------------------------------------------------------- order and names


def test_builtin_order() -> None:
    assert registry.names() == BUILTIN_NAMES
    assert tuple(p.name for p in registry.patterns()) == registry.names()


def test_latest_is_tried_first() -> None:
    registry.register(CausalToSDPA())
    registry.register(Prefix())
    assert registry.names() == ("prefix", "causal_sdpa", *BUILTIN_NAMES)


def test_same_name_takes_the_place() -> None:
    class Causal(CausalToSDPA):
        name = "causal"

    mine = Causal()
    assert registry.register(mine) is mine
    assert registry.names() == BUILTIN_NAMES
    assert registry.patterns()[0] is mine
    assert only(report_of(causal)).verdict is Verdict.REWRITTEN


def test_unregister() -> None:
    registry.unregister("sliding_window")
    assert "sliding_window" not in registry.names()
    assert only(report_of(sliding)).verdict is Verdict.REFUSED


def test_override_is_undone() -> None:
    with registry.override(Prefix(), CausalToSDPA(), disable=("full", "causal")):
        assert registry.names() == ("causal_sdpa", "prefix", "sliding_window", "compressed", "selected")
        assert only(report_of(causal)).role == "causal_sdpa"
    assert registry.names() == BUILTIN_NAMES


def test_override_is_undone_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), registry.override(Prefix()):
        raise RuntimeError("inside")
    with pytest.raises(KeyError), registry.override(Prefix(), disable=("nothing",)):
        pass
    assert registry.names() == BUILTIN_NAMES


def test_override_nests() -> None:
    with registry.override(Prefix()):
        with registry.override(disable=("prefix",)):
            assert "prefix" not in registry.names()
        assert "prefix" in registry.names()


def test_options_know_registered_names() -> None:
    registry.register(CausalToSDPA())
    assert only(report_of(causal, disable=["causal_sdpa"])).role == "causal"
    assert only(report_of(causal, only=["causal_sdpa"])).role == "causal_sdpa"
    registry.unregister("causal_sdpa")
    with pytest.raises(Exception, match="there is no pattern 'causal_sdpa'"):
        report_of(causal, only=["causal_sdpa"])


# ------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("thing", [CausalToSDPA, "causal", None], ids=["class", "name", "nothing"])
def test_what_is_no_pattern_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="register: pattern must be a Pattern"):
        registry.register(thing)
    assert registry.names() == BUILTIN_NAMES


def test_class_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern.name must be a non-empty string"):
        registry.register(Pattern())


@pytest.mark.parametrize("name", [None, 3])
def test_name_that_is_no_string_is_refused(name: Any) -> None:
    class Odd(CausalToSDPA):
        pass

    Odd.name = name
    with pytest.raises(ValueError, match="pattern.name must be a non-empty string"):
        registry.register(Odd())


def test_unknown_name_lists_the_right_ones() -> None:
    with pytest.raises(KeyError, match="no pattern named 'window'; there are causal, sliding_window"):
        registry.unregister("window")


def test_methods_that_must_be_written() -> None:
    for call in (lambda p: p.match(None), lambda p: p.build(None, None)):
        with pytest.raises(NotImplementedError):
            call(Pattern())


# ------------------------------------------------------------------------------------------- entry points


def test_entry_points_are_loaded_once_and_do_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, loads = CausalToSDPA(), []

    def points(group: str) -> list[SimpleNamespace]:
        assert group == "fsa_compile.patterns"
        return [
            SimpleNamespace(name="causal_sdpa", load=lambda: loads.append("mine") or mine),
            SimpleNamespace(name="selected", load=lambda: loads.append("not this one")),
        ]

    monkeypatch.setattr(table, "entry_points", points)
    monkeypatch.setattr(table, "_discovered", False)
    assert registry.names() == ("causal_sdpa", *BUILTIN_NAMES)
    assert registry.patterns()[0] is mine
    assert loads == ["mine"]


# ------------------------------------------------------------------------------------------- the public API suffices


def imported(module: Any) -> set[str]:
    """The modules of this package that a module imports from."""
    found: set[str] = set()
    package = module.__name__.rsplit(".", 1)[0].split(".")
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {name} if node.module else {f"{name}.{a.name}" for a in node.names}
            if name == "fsa_compile.passes":
                found |= {f"{name}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.startswith("fsa_compile")}


def test_builtin_roles_look_at_forms_and_never_at_graphs() -> None:
    """What a user's pattern may import is what the built-in ones import."""
    graph_side = {
        "sites",
        "lift",
        "reader",
        "shadow",
        "dynamo_graph",
        "legality",
        "rewrite",
        "pipeline",
        "classify",
        "smt",
        "rules",
    }
    assert not imported(builtin) & {f"fsa_compile.passes.{name}" for name in graph_side}
    assert not any("_" == part[0] for name in imported(builtin) for part in name.split("."))


def test_builtin_roles_are_patterns_like_any() -> None:
    for pattern in registry.patterns():
        own = {name for name in vars(type(pattern)) if not name.startswith("_")}
        assert own <= {"name", "rewrites", "returns_lse", "match", "check", "supports", "pays", "build"}, pattern.name
        assert type(pattern).__mro__[1] is Pattern
        assert type(pattern).__doc__


def test_everything_public_is_exported() -> None:
    assert set(registry.__all__) == {
        "BlockList", "Candidate", "Pattern", "Segment", "Tensors", "names", "override", "patterns", "register", "unregister",
    }  # fmt: skip
