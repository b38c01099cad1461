"""A dynamic sequence length: one graph for many lengths, right at each, and no recompilation that aot_eager would not have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fsa_compile
from fsa_compile.report import Report, Verdict

from .end_to_end import BLOCK, DIM, HEADS, KV_HEADS, OPTIONS, TOLERANCE, TOP_K, WINDOW, why

SCALE = DIM**-0.5
LENGTHS = (32, 48, 40)
INF = float("inf")


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = grouped(q, k, v)
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (q @ k.mT * SCALE).masked_fill(~((j <= i) & (i - j < WINDOW)), -INF).softmax(-1) @ v


def window_by_triangles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    ones = torch.ones(n, n, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ones.tril() & ones.triu(1 - WINDOW), enable_gqa=True)


def window_by_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Chunks of WINDOW queries against their own and the previous chunk."""
    q, k, v = grouped(q, k, v)
    b, h, n, d = q.shape
    q, k, v = (t.unflatten(2, (-1, WINDOW)) for t in (q, k, v))
    keys, values = (torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), 3) for t in (k, v))
    i = torch.arange(n).view(-1, WINDOW, 1)
    j = torch.cat((i.mT - WINDOW, i.mT), -1)
    visible = (j <= i) & (i - j < WINDOW) & (j >= 0)
    s = torch.einsum("bhcid,bhcjd->bhcij", q, keys) * SCALE
    return torch.einsum("bhcij,bhcjd->bhcid", s.masked_fill(~visible, -INF).softmax(-1), values).flatten(2, 3)


def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Block means behind one learned token; -inf never fills a row."""
    q, k, v = grouped(q, k, v)
    k, v = (F.pad(t.unflatten(2, (-1, BLOCK)).mean(3), (0, 0, 1, 0), value=0.5) for t in (k, v))
    i, c = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (q @ k.mT * SCALE).masked_fill((c - 1) * BLOCK + BLOCK - 1 > i, -INF).softmax(-1) @ v


def choose(q: Tensor, k: Tensor) -> Tensor:
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    s = q.unflatten(1, (KV_HEADS, -1)).mean(2) @ pooled.mT
    own = torch.arange(q.shape[2])[:, None] // BLOCK
    blocks = torch.arange(pooled.shape[2])
    return s.masked_fill(blocks > own, -INF).masked_fill(blocks == own, INF).topk(TOP_K, -1).indices


def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    indices, n = choose(q, k), q.shape[2]
    q, k, v = grouped(q, k, v)
    mask = torch.zeros(*indices.shape[:-1], n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    mask = mask[..., torch.arange(n) // BLOCK].repeat_interleave(HEADS // KV_HEADS, 1)
    causal = torch.arange(n) <= torch.arange(n)[:, None]
    return (q @ k.mT * SCALE).masked_fill(~(mask & causal), -INF).softmax(-1) @ v


def selected_by_gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n = q.shape[0], q.shape[2]
    indices = choose(q, k)
    batch, head = torch.arange(b)[:, None, None, None], torch.arange(KV_HEADS)[:, None, None]
    keys, values = (t.unflatten(2, (-1, BLOCK))[batch, head, indices].flatten(3, 4) for t in (k, v))
    position = (indices[..., None] * BLOCK + torch.arange(BLOCK)).flatten(-2)
    s = torch.einsum("bhgid,bhijd->bhgij", q.unflatten(1, (KV_HEADS, -1)), keys) * SCALE
    s = s.masked_fill((position > torch.arange(n)[:, None])[:, :, None], -INF)
    return torch.einsum("bhgij,bhijd->bhgid", s.softmax(-1), values).flatten(1, 2)


ROLES: dict[Callable[..., Tensor], str] = {
    window: "sliding_window",
    window_by_triangles: "sliding_window",
    window_by_chunks: "sliding_window",
    compressed: "compressed",
    selected: "selected",
    selected_by_gather: "selected",
}
MAY_BE_REFUSED = (window_by_chunks, selected_by_gather)
"""Chunks and gathered blocks of a length that is only known to be a multiple: right and one graph, rewritten or not."""
each_role = pytest.mark.parametrize("fn", ROLES, ids=lambda f: f.__name__)


def layer(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """``(b, n, heads * d)`` to the branch's output: q, k and v have one length, as in a model."""

    def forward(t: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (-1, DIM)).transpose(1, 2) for part in t.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 2)
        )
        return fn(q, k, v)

    return forward


def sequence(n: int, mark: Callable[[Tensor, int], None]) -> Tensor:
    """A leaf of that length; a batch of one would be specialised."""
    t = torch.randn(2, n, (HEADS + 2 * KV_HEADS) * DIM, generator=torch.Generator().manual_seed(n)).requires_grad_()
    mark(t, 1)
    return t


class Counter:
    """A backend that counts the graphs it is given and hands them to aot_eager."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)


def run(fn: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a random functional of it."""
    out = fn(leaf)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


def unmarked(t: Tensor, d: int) -> None:
    """No mark: Dynamo makes the length dynamic when it changes."""


def assert_right_everywhere(fn: Callable[[Tensor], Tensor], mark: Callable[[Tensor, int], None]) -> Report:
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="fsa", fullgraph=True, options=OPTIONS)
    for n in LENGTHS:
        leaf = sequence(n, mark)
        for got, want in zip(run(compiled, leaf), run(fn, leaf)):
            assert torch.equal(got.isnan(), want.isnan()), n
            error = (got - want).norm() / want.norm()
            assert error <= TOLERANCE, f"length {n}: off by {error:.1e}"
    return fsa_compile.last_report()


@each_role
def test_every_length_is_right_in_one_graph(fn: Callable[..., Tensor]) -> None:
    report = assert_right_everywhere(layer(fn), torch._dynamo.maybe_mark_dynamic)
    assert len(report.graphs) == 1 and len(report.sites) == 1, "recompiled"
    (site,) = report.sites
    if fn in MAY_BE_REFUSED:
        assert site.verdict is Verdict.REWRITTEN or site.reason is not None
    else:
        assert (site.verdict, site.role) == (Verdict.REWRITTEN, ROLES[fn]), why(report)


@pytest.mark.parametrize("fn", [window, compressed, selected], ids=lambda f: f.__name__)
def test_no_more_graphs_than_aot_eager(fn: Callable[..., Tensor]) -> None:
    """Unmarked: the first length is a constant, the second makes it dynamic."""
    report = assert_right_everywhere(layer(fn), unmarked)
    counter = Counter()
    torch._dynamo.reset()
    plain = torch.compile(layer(fn), backend=counter, fullgraph=True)
    for n in LENGTHS:
        plain(sequence(n, unmarked))
    assert len(report.graphs) == counter.graphs == 2
    assert all((s.verdict, s.role) == (Verdict.REWRITTEN, ROLES[fn]) for s in report.sites), why(report)


@pytest.mark.parametrize("fn", [window, window_by_triangles], ids=lambda f: f.__name__)
def test_no_length_becomes_a_constant(fn: Callable[..., Tensor]) -> None:
    """`mark_dynamic` raises if a guard pins the length; these two spellings have no guard of their own."""
    report = assert_right_everywhere(layer(fn), torch._dynamo.mark_dynamic)
    assert len(report.graphs) == 1 and report.rewritten == 1, why(report)


def test_dynamic_lengths_of_queries_and_keys_apart() -> None:
    """Compressed keys have a length of their own."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, c = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return (q @ k.mT * SCALE).masked_fill((c >= 1) & (c * BLOCK > i), -INF).softmax(-1) @ v

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="fsa", fullgraph=True, options=OPTIONS)
    for n, m in ((32, 9), (40, 11), (24, 5)):
        q, k, v = (torch.randn(2, HEADS, s, DIM, generator=torch.Generator().manual_seed(s)) for s in (n, m, m))
        for t in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(t, 2)
        torch.testing.assert_close(compiled(q, k, v), fn(q, k, v), rtol=1e-5, atol=1e-5)
    report = fsa_compile.last_report()
    assert len(report.graphs) == 1 and report.rewritten == 1, why(report)


def test_dynamic_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(selected, backend="fsa", fullgraph=True, options=OPTIONS)
    for b in (2, 3, 5):
        leaves = tuple(
            torch.randn(b, h, 32, DIM, generator=torch.Generator().manual_seed(b)) for h in (HEADS, KV_HEADS, KV_HEADS)
        )
        for t in leaves:
            torch._dynamo.mark_dynamic(t, 0)
        torch.testing.assert_close(compiled(*leaves), selected(*leaves), rtol=1e-5, atol=1e-5)
    report = fsa_compile.last_report()
    assert len(report.graphs) == 1 and report.rewritten == 1, why(report)
