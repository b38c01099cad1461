"""Equal layers are judged once: what counts as equal, and that a layer that differs in anything is judged on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile.passes import shadow
from fsa_compile.report import ReasonKind

N, D = 24, 8


class Window(nn.Module):
    """A window of `window` keys over its own input; options make it differ in one thing from its neighbours."""

    def __init__(self, window=5, scale=0.5, dtype=None, grad=True, hook=False, later=False, mask=None, causal=True):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.window, self.scale, self.dtype, self.grad, self.hook, self.later = window, scale, dtype, grad, hook, later
        self.causal = causal
        if mask is not None:
            self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = (t[:, None].clone() for t in self.qkv(x).chunk(3, -1))
        if self.dtype is not None:
            q, k, v = (t.to(self.dtype) for t in (q, k, v))
        i = torch.arange(x.shape[1])
        far = i[:, None] - i[None, :]
        seen = (far >= 0) & (far < self.window) if self.causal else far.abs() < self.window
        if hasattr(self, "mask"):
            seen = self.mask
        with torch.set_grad_enabled(self.grad):
            scores = (q @ k.transpose(-1, -2)) * self.scale
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        if self.hook:
            scores.register_hook(lambda g: g * 2)
        if self.later:
            v.mul_(0.5)
            out = out + v
        return x + self.out(out[:, 0].to(x.dtype))


def run(layers, monkeypatch, backward=True):
    """The report, and how many nodes were traced; outputs and gradients are compared with eager."""
    traced = []
    original = shadow.trace

    def trace(gm, inside, inputs):
        traced.append(len(inside))
        return original(gm, inside, inputs)

    monkeypatch.setattr("fsa_compile.passes.pipeline.trace", trace)
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    x = torch.randn(2, N, D, requires_grad=backward)
    want = model(x)
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "profit": "always", "strict": True}
    got = torch.compile(model, backend="fsa", options=options)(x)
    assert (got - want).norm() < 1e-5 * want.norm()
    if backward:
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        cotangent = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (got, want))):
            assert (a - b).norm() <= 1e-5 * b.norm()
    return fsa_compile.last_report(), sum(traced)


def test_equal_layers_are_analysed_once(monkeypatch):
    """Six layers cost what one costs, and each is named in the report."""
    _, one = run([Window()], monkeypatch)
    report, six = run([Window() for _ in range(6)], monkeypatch)
    assert six == one
    assert report.rewritten == 6
    assert [s.module for s in report.sites] == [str(k) for k in range(6)]
    assert len({s.node for s in report.sites}) == 6
    assert len({(s.role, str(s.parameters)) for s in report.sites}) == 1
    first, *others = report.sites
    assert all(p.method == f"same as {first.node}" for s in others for p in s.proofs)


@pytest.mark.parametrize(
    "difference",
    [{"window": 6}, {"scale": 0.25}, {"dtype": torch.float64}, {"causal": False}],
    ids=lambda d: next(iter(d)),
)
def test_a_layer_that_differs_is_analysed(difference, monkeypatch):
    """The second and fifth of six layers differ: they share one analysis, the others another."""
    _, one = run([Window()], monkeypatch)
    layers = [Window(**difference) if k in (1, 4) else Window() for k in range(6)]
    report, traced = run(layers, monkeypatch)
    assert one < traced < 3 * one
    if "causal" in difference:  # such a window sees the future, which no op does
        assert [s.verdict.value for s in report.sites] == [("rewritten", "refused")[k in (1, 4)] for k in range(6)]
    else:
        assert report.rewritten == 6
        assert all(p.method == f"same as {report.sites[1].node}" for p in report.sites[4].proofs)
        assert all(p.method == f"same as {report.sites[0].node}" for k in (2, 3, 5) for p in report.sites[k].proofs)


def test_what_only_the_surroundings_tell(monkeypatch):
    """Scores without gradient are another part; a hook on the scores of a repetition is seen; a
    write into the values behind the attention makes another part."""
    report, _ = run([Window(), Window(grad=False), Window(), Window(hook=True), Window()], monkeypatch)
    kinds = [s.reason.kind if s.reason is not None else None for s in report.sites]
    hooked = ReasonKind.GRADIENT if torch.__version__ >= "2.12" else ReasonKind.LOGITS  # there a hook is an autograd.Function
    assert kinds == [None, ReasonKind.GRADIENT, None, hooked, None]
    with torch.no_grad():
        report, _ = run([Window(grad=False, later=k == 1) for k in range(3)], monkeypatch, backward=False)
    assert [s.proofs[0].method.startswith("same") for s in report.sites] == [False, False, True]


def test_the_first_layer_alone_is_held_back(monkeypatch):
    """What lies around the layer that was analysed says nothing about its repetitions."""
    report, traced = run([Window(hook=True), Window(), Window()], monkeypatch)
    hooked = ReasonKind.GRADIENT if torch.__version__ >= "2.12" else ReasonKind.LOGITS
    assert [s.reason.kind if s.reason is not None else None for s in report.sites] == [hooked, None, None]
    assert report.rewritten == 2
    if hooked is ReasonKind.GRADIENT:
        assert traced == run([Window()], monkeypatch)[1], "equal layers were analysed twice"


def test_equal_layers_are_refused_for_the_same_reason(monkeypatch):
    report, _ = run([Window(causal=False) for _ in range(3)], monkeypatch)
    assert len({(s.role, s.reason, s.source) for s in report.sites}) == 1
    assert report.sites[0].reason.kind is ReasonKind.MASK


def test_frozen_layers_are_other_layers(monkeypatch):
    """Whether gradients flow decides what is legal."""
    layers = [Window() for _ in range(4)]
    for p in layers[0].parameters():
        p.requires_grad_(False)
    report, _ = run(layers, monkeypatch, backward=False)
    assert report.rewritten == 4
    assert [p.method.startswith("same") for s in report.sites for p in s.proofs[:1]] == [False, False, True, True]


def test_masks_in_buffers(monkeypatch):
    """Layers whose buffers hold equal values are equal; one with other values is judged by its own."""
    far = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    window, wider = (far >= 0) & (far < 5), (far >= 0) & (far < 6)
    torn = window.clone()
    torn[9, 2] = True
    layers = [Window(mask=m.clone()) for m in (window, window, wider, torn, window)]
    report, _ = run(layers, monkeypatch)
    assert [s.parameters.get("window") for s in report.sites] == [5, 5, 6, None, 5]
    assert [s.verdict.value for s in report.sites] == ["rewritten"] * 3 + ["refused", "rewritten"]


def test_a_buffer_of_a_repetition_is_checked(monkeypatch):
    """A later change of a buffer that was never analysed itself, because an equal one was."""
    far = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    layers = [Window(mask=(far >= 0) & (far < 5)) for _ in range(3)]
    model, x = nn.Sequential(*layers), torch.randn(2, N, D)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fsa", options={"inner": "aot_eager", "profit": "always", "strict": True})
    compiled(x)
    assert fsa_compile.last_report().rewritten == 3
    layers[2].mask.fill_(True)
    want = model(x)
    assert (compiled(x) - want).norm() < 1e-5 * want.norm()


class Checkpointed(nn.Module):
    """A layer whose activations are computed again for the backward."""

    def __init__(self, **options):
        super().__init__()
        self.layer = Window(**options)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def test_checkpointed_layers_are_analysed_once(monkeypatch):
    """Each is a graph of its own; the first is the precedent of the others, and one that differs is not."""
    _, one = run([Checkpointed()], monkeypatch)
    report, six = run([Checkpointed() for _ in range(6)], monkeypatch)
    assert six == one
    assert report.rewritten == 6 and len(report.graphs) == 7
    first, *others = report.sites
    assert all(p.method == f"same as {first.node}" for s in others for p in s.proofs)
    report, traced = run([Checkpointed(window=4 if k == 2 else 5) for k in range(5)], monkeypatch)
    assert [s.parameters["window"] for s in report.sites] == [5, 5, 4, 5, 5]
    assert one < traced < 3 * one


def test_buffers_and_hooks_of_checkpointed_layers(monkeypatch):
    """Equal values in buffers are equal, another value is not; what stands around the attention is looked at in each."""
    far = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    window, torn = (far >= 0) & (far < 5), (far >= 0) & (far < 5)
    torn[9, 2] = True
    report, _ = run([Checkpointed(mask=m.clone()) for m in (window, window, torn, window)], monkeypatch)
    assert [s.verdict.value for s in report.sites] == ["rewritten", "rewritten", "refused", "rewritten"]
    report, _ = run([Checkpointed(), Checkpointed(grad=False), Checkpointed()], monkeypatch)
    assert [s.verdict.value for s in report.sites] == ["rewritten", "refused", "rewritten"]


def test_a_later_change_in_a_checkpointed_layer(monkeypatch):
    """The buffer of a repetition is relied on too."""
    far = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    model = nn.Sequential(*(Checkpointed(mask=(far >= 0) & (far < 5)) for _ in range(3)))
    x = torch.randn(2, N, D, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fsa", options={"inner": "aot_eager", "profit": "always", "strict": True})
    compiled(x)
    assert fsa_compile.last_report().rewritten == 3
    model[2].layer.mask.fill_(True)
    want = model(x)
    assert (compiled(x) - want).norm() < 1e-5 * want.norm()


class Flex(nn.Module):
    """A window by `flex_attention`, its block mask made in the layer."""

    def __init__(self, window=5, table=None):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.window, self.table = window, table or window

    def forward(self, x):
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        window, table = self.window, self.table

        def seen(b, h, i, j):
            return (i >= j) & (i - j < window)

        def tabled(b, h, i, j):
            return (i >= j) & (i - j < table)

        mask = create_block_mask(seen if table == window else tabled, None, None, N, N, device="cpu", BLOCK_SIZE=8)
        if table != window:
            mask.mask_mod = seen
        return x + self.out(flex_attention(q, k, v, block_mask=mask)[:, 0])


@torch.no_grad()  # on the CPU there is no other way
def test_flex_attention_of_equal_layers(monkeypatch):
    """Mask functions are compared by what they compute; whether the tables agree with them is asked for each layer."""
    _, one = run([Flex()], monkeypatch, backward=False)
    report, traced = run([Flex(), Flex(), Flex(window=6), Flex(table=9)], monkeypatch, backward=False)
    assert traced == 2 * one
    assert [s.parameters["window"] for s in report.sites] == [5, 5, 6, 5]
    assert [s.verdict.value for s in report.sites] == ["rewritten", "rewritten", "rewritten", "refused"]


def test_layers_that_write_into_one_tensor(monkeypatch):
    """Parts that are entangled through a tensor that all of them write are analysed as one."""

    class Into(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Window() for _ in range(3))

        def forward(self, x):
            out = torch.zeros(3, *x.shape)
            for k, layer in enumerate(self.layers):
                q, key, v = (t[:, None] for t in layer.qkv(x).chunk(3, -1))
                i = torch.arange(x.shape[1])
                far = i[:, None] - i[None, :]
                scores = (q @ key.transpose(-1, -2)).masked_fill((far < 0) | (far >= 5), float("-inf"))
                out[k] = layer.out((scores.softmax(-1) @ v)[:, 0])
            return out.sum(0)

    report, _ = run([Into()], monkeypatch)
    assert report.rewritten == 3
