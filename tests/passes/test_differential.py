"""The differential check sees wrong rewrites that no proof can see, runs on what is rewritten, and says so where it does not run.

A lie is put behind the proofs: a pattern's `build` that computes something else than it claims, or a rewrite of the wrong tensor.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile.passes import differential
from fsa_compile.passes.rewrite import Rewriter
from fsa_compile.registry import builtin
from fsa_compile.registry.pattern import Candidate, Tensors
from fsa_compile.report import ReasonKind, Report, Verdict

from . import test_dynamic
from .end_to_end import BLOCK, DIM, HEADS, KV_HEADS, LENGTH, TOP_K, band, compiled_like_eager, only_site, qkv, randoms, why

SCALE = DIM**-0.5
Lie = Callable[[Candidate, Tensors], tuple[Candidate, Tensors]]


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~band(q.shape[2]), -torch.inf).softmax(-1) @ v


def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    small_k, small_v = (t.unflatten(2, (-1, 4)).mean(3) for t in (k, v))
    visible = torch.arange(small_k.shape[2]) * 4 + 3 <= torch.arange(q.shape[2])[:, None]
    return (q @ small_k.mT * SCALE).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0) @ small_v


def listed(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """Selected attention over the blocks ``(b, h, n, t)``, as a mask; the own block is always seen."""
    n = q.shape[2]
    own = torch.arange(n)[:, None] // BLOCK
    chosen = (blocks[..., None] == torch.arange(n // BLOCK)).any(-2) | (torch.arange(n // BLOCK) == own)
    visible = chosen.repeat_interleave(BLOCK, -1) & torch.ones(n, n, dtype=torch.bool).tril()
    return (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf).softmax(-1) @ v


def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return listed(q, k, v, (q @ k.unflatten(2, (-1, BLOCK)).mean(3).mT).topk(TOP_K, -1).indices)


def shift(name: str, by: Callable[[Any], Any]) -> Lie:
    return lambda c, t: (dataclasses.replace(c, parameters={**c.parameters, name: by(c.parameters[name])}), t)


def other(name: str, change: Callable[[Any], Any]) -> Lie:
    return lambda c, t: (c, dataclasses.replace(t, **{name: change(getattr(t, name))}))


LIES: dict[str, tuple[type, Callable[..., Tensor], Lie]] = {
    "window + 1": (builtin.SlidingWindow, window, shift("window", lambda w: w + 1)),
    "stride + 1": (builtin.Compressed, compressed, shift("stride", lambda s: s + 1)),
    "last - 1": (builtin.Compressed, compressed, shift("last", lambda s: s - 1)),
    "block size doubled": (builtin.Selected, selected, shift("block_size", lambda b: 2 * b)),
    "another causal rule": (builtin.Selected, selected, shift("rule", lambda r: "listed")),
    "lists of the next query": (builtin.Selected, selected, other("indices", lambda i: i.roll(1, 2))),
    "scale off by a thousandth": (builtin.SlidingWindow, window, other("scale", lambda s: s * 1.001)),
    "keys rolled": (builtin.SlidingWindow, window, other("k", lambda k: k.roll(1, 2))),
    "no gradient for the keys": (builtin.SlidingWindow, window, other("k", lambda k: k.detach())),
    "the gradient of the values doubled": (builtin.SlidingWindow, window, other("v", lambda v: 2 * v - v.detach())),
}


def tell(monkeypatch: pytest.MonkeyPatch, pattern: type, lie: Lie) -> None:
    honest = pattern.build
    monkeypatch.setattr(pattern, "build", lambda self, c, t: honest(self, *lie(c, t)))


def compile_and_run(fn: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any) -> Report:
    torch._dynamo.reset()
    settings = {"inner": "eager", "profit": "always", "strict": False, "differential": True, "proof_seconds": 60, **options}
    torch.compile(fn, backend="fsa", fullgraph=True, options=settings)(*inputs)
    return fsa_compile.last_report()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSA_DIFFERENTIAL", "1")


@pytest.mark.parametrize("name", LIES, ids=lambda n: n.replace(" ", "_"))
def test_a_lie_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, fn, lie = LIES[name]
    tell(monkeypatch, pattern, lie)
    report = compile_and_run(fn, qkv())
    site = only_site(report)
    assert site.verdict is Verdict.REFUSED and site.reason is not None, why(report)
    assert site.reason.kind is ReasonKind.DIFFERENTIAL
    assert f"{site.role} at test_differential.py:" in site.reason.text and "off by" in site.reason.text


def test_strict_raises_with_the_name_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, builtin.SlidingWindow, shift("window", lambda w: w + 1))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"sliding_window at test_differential\.py:\d+") as error:
        compile_and_run(window, qkv(), strict=True)
    assert isinstance(error.value.inner_exception, differential.Mismatch)


@pytest.mark.usefixtures("always")
def test_a_refused_site_runs_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a site that is rewritten and whose result it reads."""
    tell(monkeypatch, builtin.Selected, shift("block_size", lambda b: 2 * b))
    report = compiled_like_eager(lambda q, k, v: selected(window(q, k, v), k, v), qkv(), strict=False)
    assert sorted((s.role, s.verdict.value) for s in report.sites) == [("selected", "refused"), ("sliding_window", "rewritten")]


def test_without_the_option_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would see if the check were not there."""
    tell(monkeypatch, builtin.SlidingWindow, shift("window", lambda w: w + 1))
    site = only_site(compile_and_run(window, qkv(), differential=False))
    assert site.verdict is Verdict.REWRITTEN and site.checks == ()


def test_an_error_of_the_replacement_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's shapes are not looked at while rewriting: a replacement of the wrong shape would fail in the inner compiler."""
    tell(monkeypatch, builtin.SlidingWindow, other("v", lambda v: v[:, :, :, 1:]))
    site = only_site(compile_and_run(window, qkv()))
    assert site.reason is not None and site.reason.kind is ReasonKind.DIFFERENTIAL and "shape" in site.reason.text


def test_a_rewrite_of_the_wrong_tensor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the placement is trusted."""
    emit = Rewriter._emit
    monkeypatch.setattr(Rewriter, "_emit", lambda self, match, p: emit(self, match, dataclasses.replace(p, k=p.v)))
    site = only_site(compile_and_run(window, qkv()))
    assert site.reason is not None and site.reason.kind is ReasonKind.DIFFERENTIAL


# ------------------------------------------------------------------------------------------------ where it runs, and how


def checked(report: Report) -> None:
    """Every rewritten site was compared."""
    rewritten = [s for s in report.sites if s.verdict is Verdict.REWRITTEN]
    assert rewritten, why(report)
    for site in rewritten:
        (check,) = site.checks
        assert check.kind == "differential" and check.error is not None and check.error <= 1e-12, check


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In-place writes before, within and after the region."""
    k = k * 1.0
    k[:, :, 0] = 0.5
    logits = q @ k.mT
    logits *= SCALE
    logits.masked_fill_(~band(q.shape[2]), -torch.inf)
    out = logits.softmax(-1) @ v
    return out.add(1.0)


def into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The keys stand in a tensor that is made empty and filled."""
    keys = torch.zeros(k.shape)
    keys[:, :, :, :] = k.cos()
    return window(q, keys, v)


def one_tensor(x: Tensor, *_: Tensor) -> Tensor:
    """Queries, keys and values are the same."""
    return window(x, x, x)


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return window(*(t.bfloat16() for t in (q, k, v))).float()


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return selected(q, k, v)


def in_a_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(lambda *t: selected(*t) * 2.0, q, k, v, use_reentrant=False)


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second site reads what the first gave."""
    out = window(q, k, v)
    return selected(out, out.sin(), v) + compressed(q, out, v)


def without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return window(q, k, v) + 0.0


@pytest.mark.parametrize(
    "fn",
    [window, compressed, selected, written, into_a_buffer, one_tensor, in_bfloat16, under_autocast, in_a_checkpoint, two_layers],
    ids=operator.attrgetter("__name__"),
)
def test_it_runs_and_agrees(fn: Callable[..., Tensor]) -> None:
    checked(compile_and_run(fn, qkv(), strict=True))


def test_it_runs_without_gradients() -> None:
    checked(compile_and_run(without_gradients, qkv(), strict=True))


def test_lists_of_blocks_that_are_arguments_are_made_up() -> None:
    blocks = torch.randint(0, LENGTH // BLOCK, (1, HEADS, LENGTH, TOP_K), generator=torch.Generator().manual_seed(1))
    checked(compile_and_run(listed, (*qkv(), blocks), strict=True))


def dynamic(fn: Callable[..., Tensor], n: int) -> Report:
    """`compile_and_run` of a layer whose length is a symbol."""
    leaf = test_dynamic.sequence(n, lambda t, d: torch._dynamo.mark_dynamic(t, d))
    return compile_and_run(test_dynamic.layer(fn), (leaf,), strict=True)


@pytest.mark.parametrize("fn", [test_dynamic.compressed, test_dynamic.selected], ids=lambda f: f.__name__)
def test_dynamic_sizes(fn: Callable[..., Tensor]) -> None:
    checked(dynamic(fn, 64))


def test_dynamic_sizes_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differential, "ELEMENTS", HEADS * 64 * 64)
    checked(dynamic(test_dynamic.window, 256))


def test_a_large_static_graph_is_not_run_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differential, "ELEMENTS", HEADS * LENGTH * LENGTH - 1)
    report = compile_and_run(window, qkv())
    site = only_site(report)
    assert site.verdict is Verdict.REWRITTEN and site.checks[0].error is None
    assert f"differential: not run: {HEADS * LENGTH * LENGTH} elements in one tensor" in str(report)


def test_the_report_shows_the_error() -> None:
    assert "differential: largest error" in str(compile_and_run(window, qkv()))


def test_the_users_random_numbers_are_not_touched() -> None:
    torch.manual_seed(5)
    want = torch.get_rng_state()
    compile_and_run(window, qkv())
    assert torch.equal(torch.get_rng_state(), want)


@pytest.mark.usefixtures("always")
def test_the_environment_turns_it_on() -> None:
    from fsa_compile.options import Options

    assert Options.parse(None)[0].differential
    assert not Options.parse({"differential": False})[0].differential, "what the code says wins"


def test_the_environment_can_turn_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsa_compile.options import Options

    monkeypatch.setenv("FSA_DIFFERENTIAL", "0")
    assert not Options.parse(None)[0].differential


def test_grouped_heads() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window(q, *(t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v)))

    assert only_site(compile_and_run(fn, qkv(kv_heads=KV_HEADS), strict=True)).parameters["kv_heads"] == KV_HEADS


def test_scale_is_an_input() -> None:
    """A factor that is data is part of an operand."""
    scale = randoms((1,))[0].detach().abs() + 0.5
    checked(compile_and_run(lambda q, k, v, s: window(q * s, k, v), (*qkv(), scale), strict=True))
