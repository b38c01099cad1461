"""Input that the backend can do nothing with, or that hides what it needs: never a crash, never a wrong result, always a line.

The oracle is eager float32, as for the models; results must be equal whatever the verdict is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fsa_compile
from fsa_compile.report import ReasonKind, Report, Verdict

from .harness import OPTIONS, Subject, Trial, assert_same, by_module, compare, run, subject
from .subjects import BATCH, DIM, LENGTH, dense_nsa, hidden, lucidrains_layer, minimax_m3


def assert_says_what_happened(report: Report) -> None:
    """Each graph has a line: its sites with reasons where they stayed, or that there is no attention in it."""
    assert report.graphs
    printed = str(report)
    for graph in report.graphs:
        assert graph.sites or f"{graph.name}: no attention found" in printed
    for site in report.sites:
        assert site.source != "?" and site.source in printed
        assert site.verdict is Verdict.REWRITTEN or (site.reason is not None and site.reason.text), site


def checked(case: Subject, **options: Any) -> Trial:
    """Compiles the subject, demands eager's result and a line for everything."""
    trial = compare(case, **options)
    assert_same(trial.compiled, trial.eager)
    assert_says_what_happened(trial.report)
    return trial


def reasons(report: Report) -> list[ReasonKind]:
    return [site.reason.kind for site in report.sites if site.reason is not None]


class WindowAttention(nn.Module):
    """A band mask over all keys, with what users add to it.

    Args:
        dropout: On the probabilities.
        buffer: Whether the mask is a buffer, and not computed in `forward`.
        dim_head: Head dimension.
    """

    def __init__(self, dropout: float = 0.0, buffer: bool = False, dim_head: int = 16) -> None:
        super().__init__()
        self.dropout = dropout
        self.dim_head = dim_head
        self.to_qkv = nn.Linear(DIM, 3 * 4 * dim_head)
        self.register_buffer("mask", self.band(LENGTH) if buffer else None)

    @staticmethod
    def band(n: int) -> Tensor:
        """The mask (n, n) of 32 keys up to the query's own."""
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        return (distance >= 0) & (distance < 32)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(b, n, DIM) and the padding mask (b, n), True for real tokens, to (b, 4, n, dim_head)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, self.dim_head)).permute(2, 0, 3, 1, 4)
        mask = self.band(x.shape[1]) if self.mask is None else self.mask
        if padding is not None:
            mask = mask & padding[:, None, None, :]
        scores = (q @ k.transpose(-1, -2) * self.dim_head**-0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.dropout(scores.softmax(-1), self.dropout, self.training) @ v


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_plain_window_is_rewritten() -> None:
    """What the cases below differ from by one thing each."""
    assert by_module(checked(subject(WindowAttention(), hidden())).report) == {"": ["sliding_window"]}


def test_no_attention() -> None:
    trial = checked(subject(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM)), hidden()))
    assert not trial.report.sites
    assert "no attention found in 1 graph" in str(trial.report)


def test_a_softmax_that_is_no_attention() -> None:
    trial = checked(subject(nn.Sequential(nn.Linear(DIM, 8), nn.Softmax(dim=-1)), hidden()))
    assert trial.report.rewritten == 0


@pytest.mark.parametrize("causal", [False, True])
def test_only_full_attention(causal: bool) -> None:
    class Full(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    q, k, v = (torch.randn(BATCH, 4, 96, 16) for _ in range(3))
    trial = checked(subject(Full(), q, k, v))
    assert [site.verdict for site in trial.report.sites] == [Verdict.LEFT]


def test_multihead_attention_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(DIM, 4, dim_feedforward=DIM, dropout=0.0, batch_first=True)
    trial = checked(subject(layer, hidden(96)))
    assert trial.report.rewritten == 0
    # Dynamo keeps the whole of it as one call, so there may be no site; but it must not pass for "no attention".
    assert trial.report.sites or "multi_head_attention_forward" in str(trial.report)


class Broken(nn.Module):
    """The example layer with a graph break between its selection and its use."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        choose = model.choose_blocks

        def choose_and_break(probabilities: Tensor) -> Tensor:
            blocks = choose(probabilities)
            torch._dynamo.graph_break()
            return blocks

        model.choose_blocks = choose_and_break

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_a_graph_break_inside_the_model() -> None:
    plain = dense_nsa()
    case = subject(Broken(plain.model), *plain.inputs)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="fsa", options=dict(OPTIONS))
    got, report = run(case, compiled), fsa_compile.last_report()
    assert_same(got, run(case))
    assert_says_what_happened(report)
    assert len(report.graphs) > 1
    assert any(note.startswith("graph break") and "test_bad_input.py:" in note for note in report.notes)
    assert "note: graph break" in str(report)


def integers(x: Tensor) -> Tensor:
    return x.cumsum(-1) * 2 - x


def truths(a: Tensor, b: Tensor) -> Tensor:
    return (a & ~b).any(-1)


@pytest.mark.parametrize("function, inputs", [
    (integers, (torch.arange(12).view(3, 4),)),
    (truths, (torch.ones(3, 4, dtype=torch.bool), torch.eye(3, 4, dtype=torch.bool))),
])  # fmt: skip
def test_only_integers_or_truth_values(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="fsa", fullgraph=True, options=dict(OPTIONS))
    assert torch.equal(compiled(*inputs), function(*inputs))
    assert_says_what_happened(fsa_compile.last_report())


def test_attention_over_one_hot_integers() -> None:
    """Integer input that is converted on the way to the attention."""

    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = WindowAttention()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attention(F.one_hot(tokens, DIM).to(torch.float32))

    tokens = torch.randint(0, DIM, (BATCH, LENGTH))
    assert checked(subject(Integers(), tokens)).report.rewritten == 1


@pytest.mark.parametrize("make", [lucidrains_layer, dense_nsa], ids=["lucidrains", "dense"])
def test_an_empty_batch(make: Callable[..., Subject]) -> None:
    checked(make(batch=0))


@pytest.mark.parametrize("make, n", [
    (lucidrains_layer, 12), (lucidrains_layer, 5), (dense_nsa, 12), (dense_nsa, 8),
    (lambda n: minimax_m3("eager", n=n), 12),
], ids=["lucidrains-12", "lucidrains-5", "dense-12", "dense-8", "minimax-12"])  # fmt: skip
def test_a_sequence_shorter_than_a_block(make: Callable[..., Subject], n: int) -> None:
    checked(make(n=n))


def test_a_sequence_that_is_too_short_to_pay() -> None:
    trial = checked(dense_nsa(), profit="auto")
    assert reasons(trial.report) == 3 * [ReasonKind.UNPROFITABLE]


def dropped(case: Subject) -> Trial:
    """`compare` from the same random state on both sides; `aot_eager` draws the numbers that eager draws."""
    torch.manual_seed(1)
    eager = run(case)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="fsa", fullgraph=True, options=dict(OPTIONS))
    torch.manual_seed(1)
    return Trial(case, eager, run(case, compiled), fsa_compile.last_report())


def test_dropout_on_the_probabilities() -> None:
    trial = dropped(subject(WindowAttention(dropout=0.3), hidden()))
    assert reasons(trial.report) == [ReasonKind.DROPOUT]
    assert "p = 0.3" in str(trial.report)
    assert_same(trial.compiled, trial.eager)


def test_dropout_that_is_switched_off() -> None:
    model = WindowAttention(dropout=0.3).eval()
    assert checked(subject(model, hidden())).report.rewritten == 1


def test_dropout_inside_sdpa() -> None:
    class Dropped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=WindowAttention.band(q.shape[2]), dropout_p=0.3)

    q, k, v = (torch.randn(BATCH, 4, 96, 16) for _ in range(3))
    trial = dropped(subject(Dropped(), q, k, v))
    assert reasons(trial.report) == [ReasonKind.DROPOUT]
    assert_same(trial.compiled, trial.eager)


def test_a_mask_held_in_a_buffer() -> None:
    trial = checked(subject(WindowAttention(buffer=True), hidden()))
    assert trial.report.rewritten == 1


def padding(n: int = LENGTH) -> Tensor:
    """A padding mask (BATCH, n): the last row ends a quarter early."""
    mask = torch.ones(BATCH, n, dtype=torch.bool)
    mask[-1, -n // 4 :] = False
    return mask


def test_a_padding_mask_as_input() -> None:
    trial = checked(subject(WindowAttention(), hidden(), padding()))
    assert reasons(trial.report) == [ReasonKind.RUNTIME_MASK]


def test_minimax_with_a_padding_mask() -> None:
    plain = minimax_m3("sdpa")
    case = Subject(plain.model, plain.inputs, {**plain.keywords, "attention_mask": padding().long()}, plain.output)
    trial = checked(case)
    assert trial.report.rewritten == 0 and len(trial.report.sites) == 3


@pytest.mark.parametrize("dim_head", [1, 17, 264])
def test_an_unusual_head_dimension(dim_head: int) -> None:
    """The CPU path takes any; where a kernel does not, the report says so and the result is right."""
    assert checked(subject(WindowAttention(dim_head=dim_head), hidden(96))).report.sites


def test_float64() -> None:
    case = dense_nsa().to(torch.float64)
    trial = compare(case)
    assert by_module(trial.report) == {"": ["compressed", "selected", "sliding_window"]}
    assert_same(trial.compiled, trial.eager, tolerance=1e-13)


def test_an_internal_error_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `strict`, a fault of ours becomes a note, and the model runs as it was written."""

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("a fault made by the test")

    monkeypatch.setattr("fsa_compile.passes.judge.find_sites", fail)
    trial = compare(subject(WindowAttention(), hidden()), strict=False)
    assert_same(trial.compiled, trial.eager)
    assert trial.report.rewritten == 0 and "a fault made by the test" in str(trial.report)


def test_without_triton(tmp_path: Any) -> None:
    """An environment in which Triton cannot be imported: the CPU path needs none of it."""
    code = f"""
        import sys
        sys.modules["triton"] = None  # makes `import triton` fail
        import torch
        from torch.nn import functional as F
        import fsa_compile

        def window(q, k, v):
            distance = torch.arange(96)[:, None] - torch.arange(96)[None, :]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 16))

        q, k, v = (torch.randn(2, 4, 96, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
        options = {{"inner": "aot_eager", "profit": "always", "strict": True}}
        out = torch.compile(window, backend="fsa", fullgraph=True, options=options)(q, k, v)
        torch.testing.assert_close(out, window(q, k, v))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), k), torch.autograd.grad(window(q, k, v).sum(), k))
        assert not any(name.startswith("triton.") for name in sys.modules)
        print(fsa_compile.last_report())
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 attention site rewritten" in done.stdout
