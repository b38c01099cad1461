"""`flex_attention` is rewritten where its functions lift and its tables are proven; elsewhere the report says why it is not.

Forward only, see `flex.py`. The oracle is torch's own eager `flex_attention` on the same inputs, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

import fsa_compile
from fsa_compile.report import ReasonKind, Report, Verdict

from .flex import SPELLINGS, TILE
from .spelling import BATCH, BLOCK, GROUP, HEADS, QKV, Mutant, Spelling, choose_blocks, randoms
from .test_spellings import OPTIONS, TOLERANCE, rewritten, why

SEED = 2
PAIRS = tuple((spelling, mutant) for spelling in SPELLINGS for mutant in spelling.mutants)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse is deprecated")


def inputs_of(spelling: Spelling) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in spelling.make(SEED)[1])


def like_eager(fn: Callable[..., Any], *inputs: Tensor, **how: Any) -> Report:
    """Asserts that compiled and eager give the same outputs; the report."""
    torch._dynamo.reset()
    want = fn(*inputs)
    torch._dynamo.reset()
    got = torch.compile(fn, backend="fsa", fullgraph=True, options=OPTIONS, **how)(*inputs)
    report = fsa_compile.last_report()
    for a, b in zip(*(tensors(t) for t in (got, want)), strict=True):
        assert torch.equal(a.isnan(), b.isnan()), why(report)
        assert (a - b).norm() <= TOLERANCE * b.norm(), why(report)
    return report


def tensors(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if t is not None]


def refused(report: Report, *kinds: ReasonKind) -> str:
    """Asserts that the only site is refused for one of these; the text of the reason."""
    (site,) = report.sites
    assert site.verdict is Verdict.REFUSED and site.reason is not None and site.reason.kind in kinds, why(report)
    assert site.source.startswith(("test_flex.py", "flex.py")), site.source
    return site.reason.text


def qkv() -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in randoms(torch.Generator().manual_seed(SEED), QKV))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling_is_rewritten(spelling: Spelling) -> None:
    report = like_eager(spelling.make(SEED)[0], *inputs_of(spelling))
    assert rewritten(report) == list(spelling.roles), why(report)
    assert report.sites[0].source.startswith("flex.py"), report.sites[0].source


@pytest.mark.parametrize(
    "spelling, mutant", PAIRS, ids=[f"{s.name}-{m.name.replace(' ', '_')}" for s, m in PAIRS]
)
def test_mutant_keeps_its_meaning(spelling: Spelling, mutant: Mutant) -> None:
    inputs = inputs_of(spelling)
    parent, fn = spelling.make(SEED)[0], spelling.make(SEED, mutant)[0]
    assert (parent(*inputs) - fn(*inputs)).abs().max() >= 1e-3, "the mutant is no other function"
    report = like_eager(fn, *inputs)
    if mutant.must_refuse:
        assert not rewritten(report), why(report)
        assert report.sites and all(s.reason is not None and s.reason.text for s in report.sites), why(report)


def in_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 16)


def window_mask(n: int = 96, b: int | None = None) -> BlockMask:
    return create_block_mask(in_window, b, None, n, n, device="cpu", BLOCK_SIZE=TILE)


@pytest.mark.parametrize("everything", [False, True])
def test_dynamic_sizes(everything: bool) -> None:
    """A dynamic length, or all sizes; of those, torch itself makes heads and head dimensions static."""

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where((j <= i) & (i - j < 16), score, float("-inf"))

        return flex_attention(q, *kv, score_mod=score_mod, enable_gqa=True)

    q, k, v = qkv()
    inputs = q, torch.stack((k, v))
    for x in inputs if not everything else ():
        torch._dynamo.maybe_mark_dynamic(x, x.dim() - 2)
    report = like_eager(attend, *inputs, dynamic=True if everything else None)
    assert rewritten(report) == ["sliding_window"], why(report)


def test_full_attention_is_left() -> None:
    report = like_eager(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *qkv())
    assert [s.verdict for s in report.sites] == [Verdict.LEFT]


def test_one_batch_of_keys_for_all_queries() -> None:
    """torch broadcasts a batch of one; the op takes none, and the site is refused."""
    q, k, v = qkv()
    q, k, v = q, k[:1], v[:1]
    report = like_eager(lambda q, k, v: flex_attention(q, k, v, block_mask=window_mask(b=BATCH), enable_gqa=True), q, k, v)
    refused(report, ReasonKind.OPERANDS)


def test_a_block_mask_from_outside() -> None:
    mask = window_mask()
    report = like_eager(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True), *qkv())
    assert "made outside of the compiled code" in refused(report, ReasonKind.MASK)


def test_tables_made_by_hand() -> None:
    """Eager ignores the tables, kernels do not: here they hide all but the first blocks of keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = torch.ones(1, 1, 3, dtype=torch.int32)
        indices = torch.zeros(1, 1, 3, 3, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(count, indices, BLOCK_SIZE=TILE, mask_mod=in_window, seq_lengths=(96, 96))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert "not those of create_block_mask" in refused(like_eager(attend, *qkv()), ReasonKind.MASK)


def test_tables_of_another_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def wider(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < 17)

        mask = create_block_mask(wider, None, None, 96, 96, device="cpu", BLOCK_SIZE=TILE)
        mask.mask_mod = in_window
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert "not made from its own mask function" in refused(like_eager(attend, *qkv()), ReasonKind.MASK)


def test_tables_of_one_head_for_a_mask_by_head() -> None:
    """The tables know head 0 only; the mask function differs from head to head."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = k.shape[2]
        table = torch.zeros(BATCH, 2, n, n // BLOCK, dtype=torch.bool)
        table = table.scatter(-1, choose_blocks(q, k, force_own=True), True)

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return table[b, h // GROUP, i, j // BLOCK] & (j <= i)

        mask = create_block_mask(mask_mod, BATCH, None, n, n, device="cpu", BLOCK_SIZE=TILE)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert "was made for 1" in refused(like_eager(attend, *qkv()), ReasonKind.MASK)


def attend_by_table(q: Tensor, k: Tensor, v: Tensor, fill: str, change: str = "") -> Tensor:
    """A table that is made by `scatter`, or filled in place; and changed after the block mask was made from it."""
    n = k.shape[2]
    empty = torch.zeros(BATCH, 2, n, n // BLOCK, dtype=torch.bool)
    chosen = choose_blocks(q, k, force_own=True)
    table = {"scatter": empty.scatter, "scatter_": empty.scatter_}[fill](-1, chosen, True)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[b, h // GROUP, i, j // BLOCK] & (j <= i)

    mask = create_block_mask(mask_mod, BATCH, HEADS, n, n, device="cpu", BLOCK_SIZE=TILE)
    if change == "itself":
        table[..., 0] = True
    elif change == "what it is a view of":
        empty.view(-1, n, n // BLOCK)[..., 0] = True
    elif change == "for the next call":
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        table.zero_()
        return out
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("fill", ["scatter", "scatter_"])
def test_a_table_is_filled_before_the_block_mask(fill: str) -> None:
    report = like_eager(lambda q, k, v: attend_by_table(q, k, v, fill), *qkv())
    assert rewritten(report) == ["selected"], why(report)


@pytest.mark.parametrize(
    "fill, change",
    [("scatter", "itself"), ("scatter_", "itself"), ("scatter_", "what it is a view of"), ("scatter_", "for the next call")],
)
def test_a_table_that_changes_after_the_block_mask(fill: str, change: str) -> None:
    report = like_eager(lambda q, k, v: attend_by_table(q, k, v, fill, change), *qkv())
    assert "written in place" in refused(report, ReasonKind.MASK, ReasonKind.MUTATION)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="create_block_mask takes separate_full_blocks from torch 2.12 on")
def test_all_blocks_partial() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(in_window, None, None, 96, 96, device="cpu", BLOCK_SIZE=TILE, separate_full_blocks=False)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert rewritten(like_eager(attend, *qkv())) == ["sliding_window"]


@pytest.mark.parametrize("how", [{"return_lse": True}, {"return_aux": AuxRequest(lse=True)}])
def test_statistics_are_returned(how: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=window_mask(), enable_gqa=True, **how)

    assert "log-sum-exps or maxima" in refused(like_eager(attend, *qkv()), ReasonKind.OPERANDS)


def test_soft_cap() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 5 * torch.tanh(score / 5)

        return flex_attention(q, k, v, score_mod=score_mod, block_mask=window_mask(), enable_gqa=True)

    refused(like_eager(attend, *qkv()), ReasonKind.LOGITS)


def test_a_mask_that_no_rule_reads() -> None:
    """An op without a rule inside of a mask function is another datum for each pair of positions."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.sin(i * 0.5 + j) > 0.0

        mask = create_block_mask(mask_mod, None, None, 96, 96, device="cpu", BLOCK_SIZE=TILE)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    refused(like_eager(attend, *qkv()), ReasonKind.MASK, ReasonKind.RUNTIME_MASK)


def test_token_selection() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = k.shape[2]
        scores = q.unflatten(1, (2, GROUP)).mean(2) @ k.transpose(-1, -2)
        indices = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).topk(8, -1).indices

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (indices[b, h // GROUP, i] == j).any() & (j <= i)

        mask = create_block_mask(mask_mod, BATCH, HEADS, n, n, device="cpu", BLOCK_SIZE=TILE)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    refused(like_eager(attend, *qkv()), ReasonKind.TOKEN_LEVEL)


def test_documents() -> None:
    """Packed documents given as an input are known at run time only."""

    def attend(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (document[b, i] == document[b, j]) & in_window(b, h, i, j)

        mask = create_block_mask(mask_mod, BATCH, None, 96, 96, device="cpu", BLOCK_SIZE=TILE)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    document = (torch.arange(96) // 40).expand(BATCH, -1).contiguous()
    refused(like_eager(attend, *qkv(), document), ReasonKind.RUNTIME_MASK, ReasonKind.MASK)
