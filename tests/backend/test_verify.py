"""`options={"verify": True}`: the first call beside eager; what it finds, what it names, and that it leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile import VerificationError, verify
from fsa_compile.registry import builtin
from fsa_compile.registry.pattern import Candidate, Tensors

HEADS, LENGTH, DIM, WINDOW = 2, 24, 8, 5
OPTIONS = {"inner": "aot_eager", "profit": "always", "strict": True, "differential": False, "verify": True, "proof_seconds": 60}


def visible(n: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (j <= i) & (i - j < WINDOW)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sliding window: (b, h, n, d)."""
    logits = (q @ k.mT * DIM**-0.5).masked_fill(~visible(q.shape[2]), -torch.inf)
    return logits.softmax(-1) @ v


class Layer(nn.Module):
    """Attention between projections, with a buffer that counts calls and dropout behind.

    Args:
        wrap: Called with the attention and its inputs.
        p: Of the dropout.
    """

    def __init__(self, wrap: Callable[..., Tensor] = lambda f, *args: f(*args), p: float = 0.0) -> None:
        super().__init__()
        self.wrap, self.p = wrap, p
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * HEADS * DIM, HEADS * DIM, generator=generator) * (HEADS * DIM) ** -0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        q, k, v = F.linear(x, self.weight).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out = self.wrap(attend, q, k, v).transpose(1, 2).flatten(2)
        return F.dropout(out, self.p)


def hidden(n: int = LENGTH) -> Tensor:
    return torch.randn(2, n, HEADS * DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fsa", fullgraph=True, options={**OPTIONS, **options})


def tell(monkeypatch: pytest.MonkeyPatch, lie: Callable[[Candidate, Tensors], tuple[Candidate, Tensors]]) -> None:
    honest = builtin.SlidingWindow.build
    monkeypatch.setattr(builtin.SlidingWindow, "build", lambda self, c, t: honest(self, *lie(c, t)))


def wider(c: Candidate, t: Tensors) -> tuple[Candidate, Tensors]:
    return dataclasses.replace(c, parameters={"window": c.parameters["window"] + 1}), t


def other_gradient(c: Candidate, t: Tensors) -> tuple[Candidate, Tensors]:
    return c, dataclasses.replace(t, k=t.k.detach())


def rounded(c: Candidate, t: Tensors) -> tuple[Candidate, Tensors]:
    return c, dataclasses.replace(t, q=t.q.bfloat16().float())


def notes() -> list[str]:
    return [n for n in fsa_compile.last_report().notes if "eager" in n]


# ------------------------------------------------------------------------------------------------------ what it finds


def test_a_right_rewrite_passes_and_the_report_says_so() -> None:
    model, x = Layer(), hidden()
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-5)
    (note,) = notes()
    assert note.startswith("graph 0: first call compared with eager: 1 site, largest error ")
    assert "sliding_window at test_verify.py:" in note and "outputs and gradients of the graph within" in note


@pytest.mark.parametrize(
    "lie, says",
    [(wider, "output off by"), (other_gradient, "gradient of"), (rounded, "output off by")],
    ids=["output", "gradient", "precision"],
)
def test_a_wrong_rewrite_is_named(lie: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, lie)
    with pytest.raises(VerificationError, match=r"sliding_window at test_verify\.py:\d+") as error:
        compiled(Layer())(hidden())
    assert says in str(error.value) and "graph 0" in str(error.value)


def test_only_the_wrong_site_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, of which the second is rewritten wrongly; its error does not depend on the first one's rounding."""
    first, second = Layer(), Layer()
    built = []

    def lie(c: Candidate, t: Tensors) -> tuple[Candidate, Tensors]:
        built.append(c)
        return wider(c, t) if len(built) == 2 else (c, t)

    tell(monkeypatch, lie)
    with pytest.raises(VerificationError, match=r"\(1\)") as error:
        compiled(nn.Sequential(first, second))(hidden())
    assert "(0)" not in str(error.value)


def test_without_verify_it_passes_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would see if nothing were compared."""
    tell(monkeypatch, wider)
    compiled(Layer(), verify=False)(hidden())
    assert not notes()


def test_it_raises_again_until_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, wider)
    function = compiled(Layer())
    for _ in range(2):
        with pytest.raises(VerificationError):
            function(hidden())


def test_in_the_body_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layer(lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    compiled(model)(hidden()).sum().backward()
    assert "1 site" in notes()[0]
    torch._dynamo.reset()
    tell(monkeypatch, wider)
    with pytest.raises(VerificationError, match="sliding_window at test_verify"):
        compiled(model)(hidden())


def test_a_fault_of_the_inner_compiler_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites agree, the compiled graph does not."""
    hand_over = fsa_compile.backend._hand_over

    def spoilt(*args: Any) -> Callable[..., Any]:
        right = hand_over(*args)
        return lambda *inputs: tuple(t * 1.01 if t.is_floating_point() else t for t in right(*inputs))

    monkeypatch.setattr(fsa_compile.backend, "_hand_over", spoilt)
    with pytest.raises(VerificationError, match="the inner compiler is at fault") as error:
        compiled(Layer())(hidden())
    assert "output 0 is off by 1.0e-02" in str(error.value) and "agrees with eager on its own" in str(error.value)


def test_a_top_k_that_falls_the_other_way_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that jumps: behind the attention the sign of a sum that rounding decides."""

    class Jumps(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q, k, v)
            tie = q.sum(-1, keepdim=True) - q.flip(-1).sum(-1, keepdim=True)
            return torch.where(tie > 0, out, -out)

    hand_over = fsa_compile.backend._hand_over

    def reordered(*args: Any) -> Callable[..., Any]:
        right = hand_over(*args)
        return lambda *inputs: right(*(t * (1 + 2e-7) if t.is_floating_point() else t for t in inputs))

    monkeypatch.setattr(fsa_compile.backend, "_hand_over", reordered)
    q, k, v = (t.reshape(2, HEADS, LENGTH, DIM).detach() for t in (hidden(), hidden(), hidden()))
    compiled(Jumps())(q, k, v)
    assert notes()
    torch._dynamo.reset()
    monkeypatch.setattr(verify, "SLACK", 0.0)
    with pytest.raises(VerificationError, match="compiled and eager differ"):
        compiled(Jumps())(q, k, v)


# ------------------------------------------------------------------------------------------------- modes and dtypes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with mode():
        out = compiled(Layer())(hidden())
        assert not out.requires_grad and "; outputs of the graph within" in notes()[0]
        torch._dynamo.reset()
        tell(monkeypatch, wider)
        with pytest.raises(VerificationError):
            compiled(Layer())(hidden())


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        compiled(Layer())(hidden()).float().sum().backward()
        assert notes()
        torch._dynamo.reset()
        tell(monkeypatch, wider)
        with pytest.raises(VerificationError):
            compiled(Layer())(hidden())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(Layer().to(dtype))(hidden().to(dtype)).sum().backward()
    assert "outputs and gradients" in notes()[0]
    torch._dynamo.reset()
    tell(monkeypatch, wider)
    with pytest.raises(VerificationError):
        compiled(Layer().to(dtype))(hidden().to(dtype))


def test_dynamic_sizes() -> None:
    model, function = Layer(), compiled(Layer())
    for n in (24, 32, 40):
        torch.testing.assert_close(function(hidden(n)), model(hidden(n)), rtol=1e-5, atol=1e-5)
    assert len(notes()) == 2, "one for each graph: of fixed and of dynamic size"


# ---------------------------------------------------------------------------------------------- what it leaves alone


def test_it_runs_once_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    verified = verify.FirstCall._verify
    monkeypatch.setattr(verify.FirstCall, "_verify", lambda self, *args: runs.append(self.name) or verified(self, *args))
    function = compiled(Layer())
    for _ in range(3):
        function(hidden())
    assert runs == ["graph 0"]


def test_buffers_gradients_and_random_numbers_are_the_users() -> None:
    model, x = Layer(p=0.5), hidden()
    calls = []
    model.weight.register_hook(lambda g: calls.append("weight"))
    model.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    function = compiled(model)
    torch.manual_seed(3)
    got = function(x)
    after = torch.get_rng_state()
    assert model.calls.item() == 1 and model.weight.grad is None and x.grad is None and calls == []
    torch.manual_seed(3)
    again = Layer(p=0.5)(x)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(got, again, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert calls == ["weight", "accumulated"]


def test_random_numbers_of_another_kind_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor draws its own: the rewritten graph runs eagerly instead. Here the inner compiler only pretends to."""
    hand_over = fsa_compile.backend._hand_over

    def reseeded(gm: Any, inputs: Any, options: Any, *rest: Any) -> Callable[..., Any]:
        right = hand_over(gm, inputs, dataclasses.replace(options, inner="aot_eager"), *rest)
        return lambda *args: (torch.rand(1), right(*args))[1]

    monkeypatch.setattr(fsa_compile.backend, "_hand_over", reseeded)
    compiled(Layer(p=0.5), inner="inductor")(hidden())
    assert "draws other random numbers" in notes()[0]


def test_inputs_that_are_written_to() -> None:
    """Two inputs share memory, and one of them is written to."""

    def fn(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, row: Tensor) -> Tensor:
        cache[:, :, :4].copy_(k[:, :, :4])
        return attend(q, k, v) + cache.sum() + row.sum()

    q, k, v = (t.reshape(2, HEADS, LENGTH, DIM).detach() for t in (hidden(), hidden(), hidden()))
    ours, theirs = (torch.ones(2, HEADS, LENGTH, DIM) for _ in range(2))
    got = compiled(fn)(q, k, v, ours, ours[0])
    torch.testing.assert_close(got, fn(q, k, v, theirs, theirs[0]), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, theirs) and notes()


def test_a_graph_without_rewrites_is_not_compared() -> None:
    compiled(lambda x: x.sin())(hidden())
    assert not notes()


def test_what_keeps_it_from_running_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(verify.FirstCall, "_sites", no_memory)
    model, x = Layer(), hidden()
    torch.testing.assert_close(compiled(model, strict=False)(x), model(x), rtol=1e-5, atol=1e-5)
    assert notes() == ["graph 0: not compared with eager: OutOfMemoryError: no memory"]
    torch._dynamo.reset()
    with pytest.raises(torch.OutOfMemoryError):
        compiled(model)(x)
