"""Selections that are proven to be `fsa::select_blocks`, and slips of the pen that must keep the model's own list."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fsa_compile
from fsa_compile.kernels import reference
from fsa_compile.report import ReasonKind, Selection, Verdict

from .end_to_end import OPTIONS, TOLERANCE
from .scorings import (
    BATCH,
    BLOCK,
    grouped,
    HEADS,
    Indexed,
    INDEXER_SLIPS,
    INDEXERS,
    KV_HEADS,
    Layer,
    LENGTH,
    Scoring,
    SCORINGS,
    TOP_K,
)

SLIPS = {f"{name}.{slip}": s for name, parent in SCORINGS.items() for slip, s in parent.slips.items()}


def compiled(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[torch.Tensor, list[torch.Tensor], Selection]:
    """The output, the gradients of the parameters, and what became of the selection."""
    torch._dynamo.reset()
    out = torch.compile(model, backend="fsa", options={**OPTIONS, **options})(x)
    sites = fsa_compile.last_report().sites
    site = next((s for s in sites if s.role == "selected"), sites[-1])
    assert site.verdict is Verdict.REWRITTEN or site.selection is None
    return out, gradients(model, out), site.selection


def gradients(model: nn.Module, out: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.autograd.grad(out, list(model.parameters()), torch.randn(out.shape, generator=generator)))


def layer_and_input(scoring: Scoring, **kwargs: object) -> tuple[Layer, torch.Tensor]:
    torch.manual_seed(0)
    return Layer(scoring, **kwargs), 4 * torch.randn(BATCH, LENGTH, 32)


def assert_like_eager(model: nn.Module, x: torch.Tensor, out: torch.Tensor, grads: list[torch.Tensor]) -> None:
    eager = model(x)
    for ours, theirs in zip((out, *grads), (eager, *gradients(model, eager)), strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


@pytest.mark.parametrize("name", SCORINGS)
def test_scoring_of_the_op_is_fused(name):
    model, x = layer_and_input(SCORINGS[name])
    out, grads, selection = compiled(model, x)
    assert selection.fused, selection.reason
    (check,) = selection.checks
    assert check.error is not None, check.text
    assert_like_eager(model, x, out, grads)


@pytest.mark.parametrize("name", SLIPS)
def test_slip_keeps_the_list_of_the_model(name):
    model, x = layer_and_input(SLIPS[name])
    out, grads, selection = compiled(model, x)
    assert not selection.fused
    assert selection.reason.kind in (ReasonKind.SCORES, ReasonKind.UNDECIDED)
    assert_like_eager(model, x, out, grads)


@pytest.mark.parametrize("name", [*INDEXERS, *INDEXER_SLIPS])
def test_indexer(name):
    """Slips may be fused where the op computes them from other operands: flipped heads, rolled keys, negated queries."""
    torch.manual_seed(0)
    model, x = Indexed({**INDEXERS, **INDEXER_SLIPS}[name]), 4 * torch.randn(BATCH, LENGTH, 32)
    out, grads, selection = compiled(model, x)
    if name in INDEXERS:
        assert selection.fused, selection.reason
    elif name not in ("heads_swapped", "keys_rolled"):
        assert selection is None or not selection.fused
    if selection is not None and selection.fused:
        assert selection.checks[0].error is not None, selection.checks[0].text
    eager = model(x)
    pairs = zip((out, *grads), (eager, *gradients(model, eager)), strict=True)
    assert all((ours - theirs).norm() <= TOLERANCE * theirs.norm() for ours, theirs in pairs)
    if name in INDEXER_SLIPS and name not in ("one_token_ahead", "finite_fill"):  # those matter for other logits
        assert not torch.equal(eager, Indexed.forward(with_scores(model, INDEXERS["own_block"]), x))


def with_scores(model: Indexed, scores: object) -> Indexed:
    """The same parameters with other scores."""
    other = Indexed(scores)
    other.load_state_dict(model.state_dict())
    return other


def test_slips_would_be_wrong():
    """Slips choose other blocks than their parents, so that a fusion would show; three would need probabilities near one."""
    same = set()
    for name, scoring in SLIPS.items():
        model, x = layer_and_input(scoring)
        parent, _ = layer_and_input(SCORINGS[name.partition(".")[0]])
        if torch.equal(model(x), parent(x)):
            same.add(name)
    assert same <= {"group_sum.forced_by_one", "added_bonus.small_bonus", "own_appended.may_be_picked_too"}


def test_scores_are_gone_from_the_graph():
    """What a fused selection saves: nothing of the size of queries times compressed keys is left."""
    model, x = layer_and_input(SCORINGS["group_sum"])
    for selection, expected in (("fused", False), ("keep", True)):
        names = compiled_ops(model, x, selection)
        assert any("topk" in n for n in names) is expected
        assert any("softmax" in n for n in names) is expected
        assert any("select_blocks" in n for n in names) is not expected


def compiled_ops(model: nn.Module, x: torch.Tensor, selection: str) -> list[str]:
    """Names of the calls in the rewritten graph."""
    seen: list[str] = []

    def inner(gm, inputs):
        seen.extend(str(n.target) for n in gm.graph.nodes if n.op in ("call_function", "call_method"))
        return gm

    torch._dynamo.reset()

    def backend(gm, inputs):
        from fsa_compile.options import Options
        from fsa_compile.passes.pipeline import analyse_and_rewrite

        analyse_and_rewrite(gm, Options(profit="always", strict=True, selection=selection), name="graph")
        return inner(gm, inputs)

    torch.compile(model, backend=backend)(x)
    return seen


def test_keep_is_an_option():
    model, x = layer_and_input(SCORINGS["group_sum"])
    assert compiled(model, x, selection="keep")[2] is None
    with pytest.raises(Exception, match="selection.*fused"):
        torch.compile(model, backend="fsa", options={"selection": "always"})(x)


def test_compressed_branch_behind_the_selected_one_keeps_the_list():
    model, x = layer_and_input(SCORINGS["group_sum"], selected_first=True)
    out, grads, selection = compiled(model, x)
    assert not selection.fused and "after" in selection.reason.text
    assert_like_eager(model, x, out, grads)


def test_equal_layers_are_fused_each():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(Layer(SCORINGS["group_sum"]), Join()) for _ in range(3)))
    x = torch.randn(BATCH, LENGTH, 32)
    torch._dynamo.reset()
    out = torch.compile(layers, backend="fsa", options=OPTIONS)(x)
    selections = [s.selection for s in fsa_compile.last_report().sites if s.role == "selected"]
    assert [s.fused for s in selections] == [True] * 3
    assert_like_eager(layers, x, out, gradients(layers, out))


class Join(nn.Module):
    """(b, h, n, d) to (b, n, h * d)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)


def test_two_branches_with_one_query_head_each():
    """Without groups there is no sum over heads."""

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(32, 3 * 16, bias=False)

        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            i = torch.arange(x.shape[1])
            small_k, small_v = (t.unflatten(2, (-1, BLOCK)).mean(3) for t in (k, v))
            later = torch.arange(small_k.shape[2]) * BLOCK + BLOCK > i[:, None] + 1
            p = (q @ small_k.mT * 0.3).masked_fill(later, float("-inf")).softmax(-1).nan_to_num(0.0)
            compressed = p @ small_v
            scores = p.masked_fill(i[:, None] // BLOCK == torch.arange(p.shape[-1]), float("inf"))
            blocks = torch.zeros_like(p, dtype=torch.bool).scatter(-1, scores.topk(TOP_K).indices, True)
            seen = blocks.repeat_interleave(BLOCK, -1) & (i[:, None] >= i)
            return compressed + (q @ k.mT * 0.3).masked_fill(~seen, float("-inf")).softmax(-1) @ v

    torch.manual_seed(0)
    model, x = Single(), torch.randn(BATCH, LENGTH, 32)
    out, grads, selection = compiled(model, x)
    assert selection.fused, selection.reason
    assert_like_eager(model, x, out, grads)


def test_picks_are_those_of_float64_but_for_equal_scores():
    """In float32 the op and the model may order two blocks differently only if float64 scores differ by less than 1e-5."""
    generator = torch.Generator().manual_seed(0)
    n, d, blocks = 512, 16, 512 // BLOCK
    q = torch.randn(1, HEADS, n, d, generator=generator)
    k = torch.randn(1, KV_HEADS, blocks, d, generator=generator)
    rule = d**-0.5, BLOCK, BLOCK - 1, 0
    lse = torch.ops.fsa.compressed_attention(q, k, k, *rule, 0)[1]
    ours = torch.ops.fsa.select_blocks(q, k, lse, *rule, BLOCK, BLOCK, n, TOP_K, 0, 1, 0).long()
    exact = reference.compressed_visibility(torch.arange(n)[None], blocks, BLOCK, BLOCK - 1, 0)
    logits = (q.double() @ k.double().repeat_interleave(HEADS // KV_HEADS, 1).mT * rule[0]).masked_fill(~exact, float("-inf"))
    scores = grouped(logits.softmax(-1).nan_to_num(0.0))
    own = torch.arange(n)[:, None] // BLOCK == torch.arange(blocks)
    scores = scores.masked_fill(own, float("inf"))
    best = scores.topk(TOP_K).indices
    eligible = torch.arange(blocks) * BLOCK <= torch.arange(n)[:, None]

    def mask(listed: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(*listed.shape[:-1], blocks + 1, dtype=torch.bool)
        return zeros.scatter(-1, listed.where(listed >= 0, blocks), True)[..., :-1] & eligible

    missing, extra = mask(best) & ~mask(ours), mask(ours) & ~mask(best)
    assert (missing.sum(-1) == extra.sum(-1)).all()
    low, high = scores.where(missing, 0.0).sum(-1), scores.where(extra, 0.0).sum(-1)
    assert ((low - high).abs() <= 1e-5 * low).all()
