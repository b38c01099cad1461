"""Masks that the model keeps: their value is read when compiling, and a later change is seen, however it is made.

Each spelling is rewritten and has mutants of the *buffer*: the same code with another value in it, which is another function in
eager and keeps its meaning compiled. Each way to change a buffer after the compilation gives what eager gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile import checked
from fsa_compile.checked import Check, CheckedCall
from fsa_compile.passes import buffers as buffers_
from fsa_compile.report import ReasonKind, Report, Verdict

from .end_to_end import (
    BLOCK, DIM, HEADS, KV_HEADS, LENGTH, OPTIONS, TOP_K, WINDOW,
    Outcome, assert_refused, assert_rewritten, assert_same, band, compiled_like_eager, only_site, outcome, qkv, randoms, why,
)  # fmt: skip

SCALE = DIM**-0.5
INF = float("inf")
CAPACITY = 64
"""Buffers are longer than the sequences: models slice them."""
MATTERS = 1e-3
"""A mutant's eager output differs from its parent's by at least this."""

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Kept(nn.Module):
    """A module that keeps one tensor and attends with it."""

    def __init__(self, mask: Tensor, attend: Attend) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(self, q, k, v)


def filled(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(~m.mask[:n, :n], -INF).softmax(-1) @ v


def excluded(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(m.mask[..., :n, :n] != 0, torch.finfo(q.dtype).min).softmax(-1) @ v


def added(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE + m.mask[:n, :n]).softmax(-1) @ v


def fused(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask[:n, :n])


def distances(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    d = m.mask[:n, :n]
    return (q @ k.mT * SCALE).masked_fill((d < 0) | (d >= WINDOW), -INF).softmax(-1) @ v


def positions(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = m.mask[: q.shape[2]]
    d = p[:, None] - p
    return (q @ k.mT * SCALE).masked_fill((d < 0) | (d >= WINDOW), -INF).softmax(-1) @ v


def compressed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Block means behind a learned token; `mask` says which blocks are complete ``(n, blocks)``."""
    n = q.shape[2]
    k, v = (F.pad(t.unflatten(2, (-1, BLOCK)).mean(3), (0, 0, 1, 0), value=0.5) for t in (k, v))
    complete = F.pad(m.mask[:n, : n // BLOCK], (1, 0), value=True)
    return (q @ k.mT * SCALE).masked_fill(~complete, -INF).softmax(-1) @ v


def compressed_ends(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same; `mask` is the table of the blocks' last keys."""
    n = q.shape[2]
    k, v = (F.pad(t.unflatten(2, (-1, BLOCK)).mean(3), (0, 0, 1, 0), value=0.5) for t in (k, v))
    complete = F.pad(m.mask[: n // BLOCK] <= torch.arange(n)[:, None], (1, 0), value=True)
    return (q @ k.mT * SCALE).masked_fill(~complete, -INF).softmax(-1) @ v


def choose(q: Tensor, k: Tensor) -> Tensor:
    """Blocks per query ``(b, hkv, n, TOP_K)``, the own one always."""
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    s = q.unflatten(1, (KV_HEADS, -1)).mean(2) @ pooled.mT
    own, blocks = torch.arange(q.shape[2])[:, None] // BLOCK, torch.arange(pooled.shape[2])
    return s.masked_fill(blocks > own, -INF).masked_fill(blocks == own, INF).topk(TOP_K, -1).indices


def chosen(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(*q.shape[:1], KV_HEADS, q.shape[2], q.shape[2] // BLOCK, dtype=torch.bool).scatter(-1, choose(q, k), True)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v, mask = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v, mask))
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v


def selected(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`mask` is the triangle."""
    n = q.shape[2]
    return grouped(q, k, v, chosen(q, k).repeat_interleave(BLOCK, -1) & m.mask[:n, :n])


def selected_by_map(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`mask` is the map from positions to blocks."""
    i = torch.arange(q.shape[2])
    return grouped(q, k, v, chosen(q, k)[..., m.mask[: len(i)]] & (i <= i[:, None]))


@dataclass(frozen=True)
class Spelling:
    """A way to keep a mask.

    Attributes:
        attend: The code.
        mask: The value.
        role: What it is rewritten to.
        mutants: By name: what is done to the value.
    """

    attend: Attend
    mask: Tensor
    role: str
    mutants: dict[str, Callable[[Tensor], Tensor]]


def flipped(t: Tensor) -> Tensor:
    t = t.clone()
    t[..., 20, 17] = ~t[..., 20, 17] if t.dtype == torch.bool else (1 - t[..., 20, 17])
    return t


def plus_one_at(k: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        return t + (torch.arange(len(t)) == k)

    return change


def rolled(t: Tensor) -> Tensor:
    """Query 0 keeps its own key: NaN on both sides would prove nothing."""
    t = t.roll(1, 0)
    t[0] = t[1]
    return t


I, J = torch.arange(CAPACITY)[:, None], torch.arange(CAPACITY)
BLOCKS = torch.arange(CAPACITY // BLOCK)
BAND = band(CAPACITY)
COMPLETE = (BLOCKS + 1) * BLOCK - 1 <= I
ZERO_OR_INF = torch.zeros(CAPACITY, CAPACITY).masked_fill(~BAND, -INF)
KV = {compressed: HEADS, compressed_ends: HEADS, selected: KV_HEADS, selected_by_map: KV_HEADS}

WIDER = {"one key wider": lambda t: band(CAPACITY, WINDOW + 1), "a flipped bit": flipped, "rolled": rolled}
SPELLINGS: dict[str, Spelling] = {
    "band": Spelling(filled, BAND, "sliding_window", WIDER),
    "band, True where masked": Spelling(
        excluded, ~BAND, "sliding_window", {k: lambda t, f=f: ~f(~t) for k, f in WIDER.items()}
    ),
    "band of bytes, with batch and head": Spelling(
        excluded, (~BAND).to(torch.uint8)[None, None], "sliding_window", {"a flipped bit": flipped}
    ),
    "band to add": Spelling(
        added, ZERO_OR_INF, "sliding_window",
        {"a flipped bit": lambda t: torch.zeros_like(t).masked_fill(~flipped(t == 0), -INF), "a bias": lambda t: t + J % 3},
    ),
    "band for sdpa": Spelling(fused, BAND, "sliding_window", WIDER),
    "distances": Spelling(distances, I - J, "sliding_window", {"one too far": lambda t: t - 1, "rolled": rolled}),
    "positions": Spelling(positions, J.clone(), "sliding_window", {"one moved": plus_one_at(9), "doubled": lambda t: 2 * t}),
    "positions of float32": Spelling(positions, J.float(), "sliding_window", {"by halves": lambda t: t / 2}),
    "complete blocks": Spelling(
        compressed, COMPLETE, "compressed", {"one token later": lambda t: rolled(t), "a flipped bit": lambda t: _flip_last(t)}
    ),
    "ends of blocks": Spelling(
        compressed_ends, (BLOCKS + 1) * BLOCK - 1, "compressed", {"one end moved": plus_one_at(2), "begin": lambda t: t - 1}
    ),
    "triangle of a selection": Spelling(
        selected, J <= I, "selected", {"the future": lambda t: J < I + 2, "a flipped bit": lambda t: t & ~((I == 21) & (J == 20))}
    ),
    "map to blocks": Spelling(
        selected_by_map, J // BLOCK, "selected", {"one key in the next block": plus_one_at(7), "swapped": lambda t: t ^ 1}
    ),
}  # fmt: skip


def _flip_last(t: Tensor) -> Tensor:
    t = t.clone()
    t[20, 1] = False
    return t


def inputs_for(attend: Attend, n: int = LENGTH) -> tuple[Tensor, ...]:
    return qkv(n, kv_heads=KV.get(attend, HEADS))


def compiled(module: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(module, backend="fsa", fullgraph=True, options={**OPTIONS, **options})


def largest_difference(a: Outcome, b: Outcome) -> float:
    return max(float((p - r).abs().nan_to_num(INF).max()) for p, r in zip(a.outputs, b.outputs))


each_spelling = pytest.mark.parametrize("name", SPELLINGS)


# -- what is read
@each_spelling
def test_parent_is_rewritten(name: str) -> None:
    s = SPELLINGS[name]
    report = compiled_like_eager(Kept(s.mask, s.attend), inputs_for(s.attend))
    assert_rewritten(report, s.role)
    assert [g.notes for g in report.graphs] == [("relies on the value of self.mask, which is checked at each call",)]


@pytest.mark.parametrize(("name", "mutant"), [(n, m) for n, s in SPELLINGS.items() for m in s.mutants])
def test_mutant_keeps_its_meaning(name: str, mutant: str) -> None:
    s = SPELLINGS[name]
    other, inputs = s.mutants[mutant](s.mask), inputs_for(s.attend)
    assert largest_difference(*(outcome(Kept(m, s.attend), inputs) for m in (s.mask, other))) >= MATTERS
    compiled_like_eager(Kept(other, s.attend), inputs)


def test_a_flipped_bit_is_the_counterexample() -> None:
    report = compiled_like_eager(Kept(flipped(BAND), filled), inputs_for(filled))
    assert_refused(report, ReasonKind.MASK)
    counterexample = only_site(report).counterexample
    assert counterexample is not None and (counterexample.query, counterexample.key) == (20, 17)
    assert counterexample.model_sees is False
    assert not report.graphs[0].notes, "nothing relies on the buffer"


def test_a_bit_that_no_query_reaches_is_no_obstacle() -> None:
    mask = BAND.clone()
    mask[LENGTH, 0] = True
    assert_rewritten(compiled_like_eager(Kept(mask, filled), inputs_for(filled)))


def test_noise_is_refused_by_name() -> None:
    mask = torch.rand(CAPACITY, CAPACITY, generator=torch.Generator().manual_seed(0)) < 0.5
    report = compiled_like_eager(Kept(mask | torch.eye(CAPACITY).bool(), filled), inputs_for(filled))
    assert_refused(report, ReasonKind.RUNTIME_MASK)
    reason = only_site(report).reason
    assert reason is not None and "self.mask, whose value is no rule that is known" in reason.text
    assert reason.source is not None and reason.source.startswith("test_buffers.py:")


# -- where masks are kept
GLOBAL = BAND.clone()


def by_global(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(~GLOBAL[:n, :n], -INF).softmax(-1) @ v


def closing_over(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT * SCALE).masked_fill(~mask[:n, :n], -INF).softmax(-1) @ v

    return attend


class Plain(nn.Module):
    """Tensors that are no buffers: an attribute and an element of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.past, self.near = torch.ones(CAPACITY, CAPACITY).tril().bool(), [I - J < WINDOW]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT * SCALE).masked_fill(~(self.past[:n, :n] & self.near[0][:n, :n]), -INF).softmax(-1) @ v


class Checkpointed(Kept):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(super().forward, q, k, v, use_reentrant=False)


@pytest.mark.parametrize(
    ("fn", "label"),
    [
        (by_global, "GLOBAL"),
        (closing_over(BAND), "mask"),
        (Plain(), "self.near[0], self.past"),
        (Checkpointed(BAND, filled), "self.mask"),
        (nn.ModuleDict({"attn": Kept(BAND, filled)})["attn"], "self.mask"),
    ],
    ids=["global", "closure", "attribute and list", "checkpoint", "module"],
)
def test_places(fn: Any, label: str) -> None:
    report = compiled_like_eager(fn, inputs_for(filled))
    assert_rewritten(report)
    assert [n for g in report.graphs for n in g.notes] == [f"relies on the value of {label}, which is checked at each call"]


def test_an_argument_is_no_buffer() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v

    report = compiled_like_eager(fn, (*inputs_for(filled), band()))
    assert_refused(report, ReasonKind.RUNTIME_MASK)
    assert "(mask)" in str(only_site(report).reason)


def test_a_parameter_is_not_read() -> None:
    """Its value moves, and it wants a gradient."""
    module = Kept(BAND, added)
    del module.mask
    module.mask = nn.Parameter(torch.zeros(CAPACITY, CAPACITY).masked_fill(~BAND, -1e9))
    assert_refused(compiled_like_eager(module, inputs_for(filled)))


def test_a_fixed_parameter_is_not_read() -> None:
    module = Kept(BAND, added)
    del module.mask
    module.mask = nn.Parameter(torch.zeros(CAPACITY, CAPACITY).masked_fill(~BAND, -1e9), requires_grad=False)
    assert_refused(compiled_like_eager(module, inputs_for(filled)))


class Writing(Kept):
    """Writes into its mask before it uses it: through the buffer itself, or through a view of it."""

    def __init__(self, how: str) -> None:
        super().__init__(BAND.clone(), filled)
        self.how, self.row = how, self.mask[3]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "buffer":
            self.mask[20, 15] = False
        elif self.how == "view":
            self.row[1] = False
        elif self.how == "data":
            self.mask.data[20, 15] = False
        else:
            self.mask.logical_and_(J != 15)
        return super().forward(q, k, v)


@pytest.mark.parametrize("how", ["buffer", "view", "data", "method"])
def test_a_buffer_that_the_graph_writes_is_not_read(how: str) -> None:
    assert_refused(compiled_like_eager(Writing(how), inputs_for(filled)))


# -- what happens later
def replace_data(m: Any, new: Tensor) -> None:
    m.mask.data = new


def write_behind(m: Any, new: Tensor) -> None:
    m.mask.data.copy_(new)


def write_by_numpy(m: Any, new: Tensor) -> None:
    m.mask.numpy()[:] = new.numpy()


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "copy_": lambda m, new: m.mask.copy_(new),
    "index": lambda m, new: m.mask.__setitem__(slice(None), new),
    "load_state_dict": lambda m, new: m.load_state_dict({"mask": new}),
    "load_state_dict, assigned": lambda m, new: m.load_state_dict({"mask": new.clone()}, assign=True),
    "another tensor": lambda m, new: setattr(m, "mask", new.clone()),
    "data replaced": lambda m, new: replace_data(m, new.clone()),
    "written through data": write_behind,
    "written through numpy": write_by_numpy,
    "written through a view": lambda m, new: m.mask.view(-1).copy_(new.reshape(-1)),
    "set_": lambda m, new: m.mask.set_(new.clone()),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_after_compiling_is_seen(how: str, caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = Kept(BAND.clone(), filled), inputs_for(filled)
    call = compiled(module)
    before = outcome(call, inputs)
    assert_same(before, outcome(module, inputs))
    assert_rewritten(fsa_compile.last_report())

    CHANGES[how](module, band(CAPACITY, WINDOW + 1))
    wider = outcome(module, inputs)
    assert largest_difference(before, wider) >= MATTERS
    assert_same(outcome(call, inputs), wider)
    text = "self.mask changed after the compilation, which relied on it: the graph runs as it was written"
    assert fsa_compile.last_report().notes == (text,) and [r.getMessage() for r in caplog.records].count(text) == 1

    CHANGES[how](module, BAND)
    assert_same(outcome(call, inputs), before)


def test_the_same_value_elsewhere_is_no_change() -> None:
    module, inputs = Kept(BAND.clone(), filled), inputs_for(filled)
    call = compiled(module)
    outcome(call, inputs)
    module.mask = BAND.clone()
    assert_same(outcome(call, inputs), outcome(module, inputs))
    assert not fsa_compile.last_report().notes


def test_changes_between_calls_with_a_dynamic_length() -> None:
    module, wider = Kept(BAND.clone(), filled), band(CAPACITY, WINDOW + 1)
    call = compiled(module)
    for n, mask in ((32, BAND), (48, BAND), (48, wider), (40, wider), (40, BAND), (24, BAND)):
        module.mask.copy_(mask)
        q, k, v = (t.detach().expand(2, -1, -1, -1).contiguous() for t in inputs_for(filled, n))
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 2)
        torch.testing.assert_close(call(q, k, v), module(q, k, v), rtol=1e-5, atol=1e-5)
    report = fsa_compile.last_report()
    assert len(report.graphs) == 1 and report.rewritten == 1, why(report)


class Autocast(Kept):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(q, k, v)


@pytest.mark.parametrize(("kind", "traced"), [(Kept, True), (Checkpointed, False), (Autocast, False)])
def test_what_runs_after_a_change(kind: Callable[..., nn.Module], traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept graph is compiled like any other, unless it holds what Dynamo may not take twice: then it runs as it is."""
    module, inputs = kind(BAND.clone(), filled), inputs_for(filled)
    call = compiled(module)
    outcome(call, inputs)
    handed: list[torch.fx.GraphModule] = []
    hand_over = fsa_compile.backend._hand_over
    monkeypatch.setattr(fsa_compile.backend, "_hand_over", lambda gm, *a: handed.append(gm) or hand_over(gm, *a))
    module.mask.copy_(band(CAPACITY, WINDOW + 1))
    for _ in range(2):
        assert_same(outcome(call, inputs), outcome(module, inputs))
    assert len(handed) == traced
    assert not any("fsa" in str(n.target) for gm in handed for n in gm.graph.nodes)


def test_one_copy_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values are read once and kept once; each buffer is checked."""
    fitted, checks = [], []
    fit, call_type = buffers_.fit, fsa_compile.backend.CheckedCall
    monkeypatch.setattr(buffers_, "fit", lambda t: fitted.append(t) or fit(t))
    monkeypatch.setattr(fsa_compile.backend, "CheckedCall", lambda c, o, ks, f: checks.extend(ks) or call_type(c, o, ks, f))

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Kept(BAND.clone(), filled) for _ in range(3))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for layer in self.layers:
                v = layer(q, k, v)
            return v

    module = Layers()
    call, inputs = compiled(module), inputs_for(filled)
    assert_same(outcome(call, inputs), outcome(module, inputs))
    assert fsa_compile.last_report().rewritten == 3
    assert len(fitted) == 1 and len(checks) == 3 and len({id(c.value) for c in checks}) == 1
    assert [c.label for c in checks] == [f"self.layers[{k}].mask" for k in range(3)]
    module.layers[1].mask[20, 15] = False
    assert_same(outcome(call, inputs), outcome(module, inputs))
    assert fsa_compile.last_report().notes[0].startswith("self.layers[1].mask changed")


def test_a_layer_whose_mask_is_an_argument_is_another_layer() -> None:
    """The same code twice: the mask is a buffer in one layer and an argument in the other, which adds the buffer."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", band(LENGTH))
            self.into = nn.Linear(DIM, DIM)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
            for mask, more in ((self.mask, other), (other, self.mask)):
                q, k, v = self.into(q), self.into(k), self.into(v)
                v = (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v + more.sum()
            return v

    other = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    report = compiled_like_eager(Two(), (*inputs_for(filled), other | torch.eye(LENGTH).bool()))
    assert [s.verdict for s in report.sites] == [Verdict.REWRITTEN, Verdict.REFUSED], why(report)


def test_a_graph_that_relies_on_no_buffer_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that only refused and left sites read needs no check."""
    monkeypatch.setattr(fsa_compile.backend, "CheckedCall", None)
    triangle = torch.ones(CAPACITY, CAPACITY).tril().bool()
    report = compiled_like_eager(Kept(triangle, filled), inputs_for(filled))
    assert only_site(report).verdict is Verdict.LEFT
    assert not report.graphs[0].notes


def test_explain_reads_buffers_and_keeps_them() -> None:
    module = Kept(BAND.clone(), filled)
    torch._dynamo.reset()
    report = fsa_compile.explain(module, *inputs_for(filled))
    assert only_site(report).role == "sliding_window", why(report)
    assert torch.equal(module.mask, BAND)


# -- the check itself
def check_of(t: Tensor) -> Check:
    return Check(0, "mask", t.clone(), t)


def test_the_check_compares_every_element() -> None:
    t = BAND.clone()
    check = check_of(t)
    assert check.holds(t) and check.holds(t.clone())
    for other in (BAND.float(), BAND[:-1], BAND[None], flipped(BAND), BAND.float().requires_grad_(), nn.Parameter(BAND.float())):
        assert not check.holds(other)
    t.data[7, 7] = False
    assert not check.holds(t)


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.mT, lambda t: t[1:, :7], lambda t: t.view(-1)[3:], lambda t: t[:0]])
def test_words_are_equal_when_values_are(view: Callable[[Tensor], Tensor]) -> None:
    for t in (BAND, ZERO_OR_INF, J, torch.tensor(0.5).expand(4, 8), torch.ones(8, 8, dtype=torch.bfloat16)):
        a, b = view(t) if t.dim() == 2 else t, view(t.clone()) if t.dim() == 2 else t.clone()
        assert torch.equal(*checked.in_words(a, b))
        if a.numel():
            b = b.clone()
            last = (-1,) * b.dim()
            b[last] = ~b[last] if b.dtype == torch.bool else 7
            assert not torch.equal(*checked.in_words(a, b))


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are treated like those on CUDA, where the host must not wait for elements."""
    monkeypatch.setattr(checked, "_at_hand", lambda t: False)


def test_far_away_the_host_compares_only_what_torch_knows_to_have_changed(far: None, monkeypatch: pytest.MonkeyPatch) -> None:
    t = BAND.clone()
    check = check_of(t)
    waits = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: waits.append(1) or equal(a, b))
    assert check.holds(t) and check.holds(t) and not waits
    t.copy_(BAND)
    assert check.holds(t) and len(waits) == 1
    assert check.holds(t) and len(waits) == 1, "the new version is remembered"
    assert check.holds(t.clone()) and len(waits) == 2
    t[7, 7] = False
    assert not check.holds(t) and not check.holds(t), "a wrong value is not remembered"


def test_far_away_a_hidden_change_is_an_error(far: None) -> None:
    t = BAND.clone()
    check = check_of(t)
    t.data[7, 7] = False
    with pytest.raises(RuntimeError, match="changed behind torch's back"):
        check.holds(t)


def test_far_away_inference_tensors_are_always_compared(far: None) -> None:
    """They count no versions."""
    with torch.inference_mode():
        t = BAND.clone()
        check = check_of(t)
        assert check.holds(t)
        t[7, 7] = False
        assert not check.holds(t)


def test_a_call_is_reported_once_for_each_change() -> None:
    t, said = BAND.clone(), []
    call = CheckedCall(lambda m: "compiled", lambda m: "original", [check_of(t)], said.append)
    assert call(t) == "compiled"
    t[7, 7] = False
    assert [call(t), call(t)] == ["original", "original"] and said == [("mask",)]
    t[7, 7] = True
    assert call(t) == "compiled"
    t[7, 7] = False
    assert call(t) == "original" and said == [("mask",)] * 2


def test_the_model_is_not_copied_into_the_compiled_code() -> None:
    """What is kept for the check is a copy of the value: the buffer itself can go."""
    module = Kept(BAND.clone(), filled)
    call = compiled(module)
    outcome(call, inputs_for(filled))
    twin = copy.deepcopy(module)
    twin.mask.copy_(band(CAPACITY, WINDOW + 1))
    assert_same(outcome(torch.compile(twin, backend="fsa", options=OPTIONS), inputs_for(filled)), outcome(twin, inputs_for(filled)))
    assert_same(outcome(call, inputs_for(filled)), outcome(module, inputs_for(filled)))
