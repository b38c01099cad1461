"""Padding masks and packed documents: known at run time only, refused with the reason and the line; constant ones are read.

Whatever happens to it, compiled code keeps its meaning. Each spelling has a mutant, the same code with another comparison: it is
another function in eager and keeps its own meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fsa_compile
from fsa_compile.report import ReasonKind, Verdict

from .end_to_end import (
    BLOCK, DIM, HEADS, LENGTH, OPTIONS, assert_rewritten, band, compiled_like_eager, only_site, outcome, randoms, why,
)  # fmt: skip

SCALE = DIM**-0.5
INF = float("inf")
BATCH = 2
MATTERS = 1e-3
"""A mutant's eager output differs from its parent's by at least this."""
Compare = Callable[[Any, Any], Any]

GENERATOR = torch.Generator().manual_seed(0)
PAD = torch.rand(BATCH, LENGTH, generator=GENERATOR) < 0.8
"""True where a key counts. It has holes."""
LENGTHS = torch.tensor([LENGTH - 3, LENGTH - 6])
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 20 + [2] * 7, [0] * 17 + [1] * 15])
STARTS = F.pad(DOCUMENTS.diff(), (1, 0), value=1)
POSITIONS = torch.cat([torch.arange(n) for n in (5, 20, 7, 17, 15)]).view(BATCH, LENGTH)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v


# -- padding: `counts` says what a key must have to be seen
def keys(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(pad, True)[:, None, None, :]  # the mask of `keys`
    return attend(q, k, v, band() & mask)


def keys_apart(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, counts: Compare = operator.eq) -> Tensor:
    s = (q @ k.mT * SCALE).masked_fill(~band(), -INF)
    hidden = ~counts(pad, True)[:, None, None, :]  # the mask of `keys_apart`
    return s.masked_fill(hidden, -INF).softmax(-1) @ v


def additive(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, counts: Compare = operator.eq) -> Tensor:
    bias = (1.0 - counts(pad, True).float())[:, None, None, :] * -1e9  # the mask of `additive`
    return ((q @ k.mT * SCALE).masked_fill(~band(), -1e9) + bias).softmax(-1) @ v


def for_sdpa(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(pad, True)[:, None, None, :]  # the mask of `for_sdpa`
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band() & mask)


def lengths(q: Tensor, k: Tensor, v: Tensor, n: Tensor, counts: Compare = operator.lt) -> Tensor:
    valid = counts(torch.arange(LENGTH), n[:, None])  # the mask of `lengths`
    return attend(q, k, v, band() & valid[:, None, None, :])


def queries_too(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, counts: Compare = operator.eq) -> Tensor:
    """Outputs of padded queries are set to zero behind the attention."""
    pad = counts(pad, True)  # the mask of `queries_too`
    return attend(q, k, v, pad[:, None, None, :] & band()).masked_fill(~pad[:, None, :, None], 0.0)


def sequences(q: Tensor, k: Tensor, v: Tensor, counts_at_all: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(counts_at_all, True)[:, None, None, None]  # the mask of `sequences`
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & band())


def choose(q: Tensor, k: Tensor) -> Tensor:
    """The keys of two chosen blocks per query ``(b, h, n, n)``, the own block always."""
    pooled = k.unflatten(2, (-1, BLOCK)).mean(3)
    own, blocks = torch.arange(LENGTH)[:, None] // BLOCK, torch.arange(LENGTH // BLOCK)
    s = (q @ pooled.mT).masked_fill(blocks > own, -INF).masked_fill(blocks == own, INF)
    return torch.zeros_like(s, dtype=torch.bool).scatter(-1, s.topk(2, -1).indices, True).repeat_interleave(BLOCK, -1)


def selected_keys(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(pad, True)[:, None, None, :]  # the mask of `selected_keys`
    return attend(q, k, v, choose(q, k) & mask & torch.ones(LENGTH, LENGTH).tril().bool())


# -- packed documents: `counts` says how the documents of a query and a key must compare
def documents(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(doc[:, :, None], doc[:, None, :])  # the mask of `documents`
    return attend(q, k, v, mask[:, None] & band())


def starts(q: Tensor, k: Tensor, v: Tensor, first: Tensor, counts: Compare = operator.eq) -> Tensor:
    doc = first.cumsum(-1)  # the mask of `starts`
    return attend(q, k, v, counts(doc[:, :, None], doc[:, None, :])[:, None] & band())


def resets(q: Tensor, k: Tensor, v: Tensor, position: Tensor, counts: Compare = operator.eq) -> Tensor:
    doc = (position == 0).cumsum(-1)  # the mask of `resets`
    return attend(q, k, v, counts(doc[:, :, None], doc[:, None, :])[:, None] & band())


def positions(q: Tensor, k: Tensor, v: Tensor, position: Tensor, counts: Compare = operator.ge) -> Tensor:
    """Causal by positions that may start again: without resets this is a triangle."""
    mask = counts(position[:, :, None], position[:, None, :])  # the mask of `positions`
    return attend(q, k, v, mask[:, None] & band())


def documents_for_sdpa(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(doc[:, :, None], doc[:, None, :])  # the mask of `documents_for_sdpa`
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(mask & causal)[:, None])


def selected_documents(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, counts: Compare = operator.eq) -> Tensor:
    mask = counts(doc[:, :, None], doc[:, None, :])[:, None]  # the mask of `selected_documents`
    return attend(q, k, v, choose(q, k) & mask & torch.ones(LENGTH, LENGTH).tril().bool())


@dataclass(frozen=True)
class Case:
    """A spelling, what it takes beside q, k and v, how its mutant compares, and words of the reason."""

    fn: Callable[..., Tensor]
    data: Tensor
    mutant: Compare
    words: str


PADDING, PACKED = "a padding mask: ", "packed documents: "
CASES = (
    Case(keys, PAD, operator.ne, PADDING + "pad"),
    Case(keys_apart, PAD, operator.ne, PADDING + "pad"),
    Case(additive, PAD, operator.ne, PADDING + "pad"),
    Case(for_sdpa, PAD, operator.ne, PADDING + "pad"),
    Case(lengths, LENGTHS, operator.le, PADDING + "n"),
    Case(sequences, torch.tensor([True, False]), operator.ne, "a condition on whole sequences (counts_at_all)"),
    Case(queries_too, PAD, operator.ne, PADDING + "pad"),
    Case(selected_keys, PAD, operator.ne, PADDING + "pad"),
    Case(documents, DOCUMENTS, operator.ge, PACKED + "doc"),
    Case(starts, STARTS, operator.ge, PACKED + "doc"),
    Case(resets, POSITIONS, operator.ge, PACKED + "doc"),
    Case(positions, POSITIONS, operator.eq, PACKED + "position"),
    Case(documents_for_sdpa, DOCUMENTS, operator.ge, PACKED + "doc"),
    Case(selected_documents, DOCUMENTS, operator.ge, PACKED + "doc"),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.fn.__name__)


def tensors() -> tuple[Tensor, ...]:
    return randoms(*[(BATCH, HEADS, LENGTH, DIM)] * 3)


def line_of(fn: Callable[..., Tensor]) -> str:
    """``"file.py:41"`` of the line with the mask of `fn`."""
    path = Path(__file__)
    marked = (k for k, text in enumerate(path.read_text().splitlines(), 1) if text.endswith(f"# the mask of `{fn.__name__}`"))
    return f"{path.name}:{next(marked)}"


@each_case
def test_refused_with_the_reason_and_the_line(case: Case) -> None:
    site = only_site(compiled_like_eager(case.fn, (*tensors(), case.data)))
    assert site.verdict is Verdict.REFUSED and site.reason is not None
    assert site.reason.kind is ReasonKind.RUNTIME_MASK, site.reason
    assert site.reason.text.startswith(case.words), site.reason
    assert site.reason.source == line_of(case.fn)


@each_case
def test_mutant_keeps_its_meaning(case: Case) -> None:
    def mutant(q: Tensor, k: Tensor, v: Tensor, data: Tensor) -> Tensor:
        return case.fn(q, k, v, data, case.mutant)

    inputs = (*tensors(), case.data)
    ours, theirs = (outcome(f, inputs).outputs[0] for f in (case.fn, mutant))
    assert (ours - theirs).abs().nan_to_num(INF).max() >= MATTERS
    assert only_site(compiled_like_eager(mutant, inputs)).verdict is Verdict.REFUSED


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids=lambda c: c.fn.__name__)
def test_dynamic_length_keeps_its_meaning(case: Case) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, data: Tensor) -> Tensor:
        n = q.shape[2]
        i = torch.arange(n)
        near = (i <= i[:, None]) & (i[:, None] - i < 8)
        if case.fn is documents:
            more = (data[:, :, None] == data[:, None, :])[:, None]
        else:
            more = (data if case.fn is keys else i < data[:, None])[:, None, None, :]
        return attend(q, k, v, near & more)

    torch._dynamo.reset()
    call = torch.compile(fn, backend="fsa", fullgraph=True, options=OPTIONS)
    for n in (LENGTH, 24, 28):
        q, k, v = (t.detach()[:, :, :n].contiguous() for t in tensors())
        data = case.data[:, :n].contiguous() if case.data.dim() == 2 else case.data
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 2)
        if data.dim() == 2:
            torch._dynamo.mark_dynamic(data, 1)
        torch.testing.assert_close(call(q, k, v, data), fn(q, k, v, data), rtol=1e-5, atol=1e-5, equal_nan=True)
    report = fsa_compile.last_report()
    assert len(report.graphs) == 1 and report.rewritten == 0, why(report)


# -- constant ones
class Kept(nn.Module):
    """What is data elsewhere is a buffer here."""

    def __init__(self, fn: Callable[..., Tensor], data: Tensor) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.fn = fn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.fn(q, k, v, self.data)


CONSTANT = {
    "every key counts": (keys, torch.ones_like(PAD)),
    "every key counts, added": (additive, torch.ones_like(PAD)),
    "full lengths": (lengths, torch.full((BATCH,), LENGTH)),
    "one document": (documents, torch.zeros_like(DOCUMENTS)),
    "one document in each row": (documents, torch.arange(BATCH)[:, None].expand(-1, LENGTH).contiguous()),
    "positions without resets": (positions, torch.arange(LENGTH).expand(BATCH, -1).contiguous()),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_mask_is_read(name: str) -> None:
    fn, data = CONSTANT[name]
    assert_rewritten(compiled_like_eager(Kept(fn, data), tensors()))


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_with_another_value_keeps_its_meaning(name: str) -> None:
    fn, data = CONSTANT[name]
    other = data.clone()
    if fn is not lengths:
        other[0, 11:] = 0 if data.dtype == torch.bool else other[0, 11:] + 7 if fn is documents else other[0, 11:] - 11
    if fn is lengths:
        other = data - torch.tensor([0, 9])
    ours, theirs = (outcome(Kept(fn, d), tensors()).outputs[0] for d in (data, other))
    assert (ours - theirs).abs().nan_to_num(INF).max() >= MATTERS
    assert only_site(compiled_like_eager(Kept(fn, other), tensors())).verdict is Verdict.REFUSED


def test_documents_of_one_length_are_no_op() -> None:
    """Known when compiling, and still no op sees blocks of keys of its own document only."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return documents(q, k, v, (torch.arange(LENGTH) // 16).expand(BATCH, -1))

    site = only_site(compiled_like_eager(fn, tensors()))
    assert site.verdict is Verdict.REFUSED and site.reason is not None and site.reason.kind is ReasonKind.MASK
    assert site.counterexample is not None


def test_one_document_by_construction_is_read() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return documents(q, k, v, torch.zeros(BATCH, LENGTH, dtype=torch.long))

    assert_rewritten(compiled_like_eager(fn, tensors()))
