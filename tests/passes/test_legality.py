"""What stands around and inside a proven site: writes, detached parts, hooks, modes, other users of its values.

Every function is compared with itself in eager mode, forward and gradients. Where the rewrite stays right it is asked for; where
it cannot be right the reason is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fsa_compile
from fsa_compile.report import ReasonKind

from .end_to_end import (
    BATCH,
    BLOCK,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    TOP_K,
    assert_refused,
    assert_rewritten,
    band,
    compiled_like_eager,
    only_site,
    qkv,
    randoms,
    why,
)

INF = math.inf
SCALE = DIM**-0.5


def logits(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~band(q.shape[2]), -INF)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(q, k).softmax(-1) @ v


def test_plain_attention_is_rewritten() -> None:
    """What the functions below vary."""
    assert_rewritten(compiled_like_eager(attend, qkv()))


# ------------------------------------------------------------------------------------------- in-place writes


def without_grad(n: int = LENGTH) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in qkv(n))


def write_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.sin()
    scores = logits(q, k)
    k.add_(1.0)
    return scores.softmax(-1) @ v + k.sum() * 0


def write_values_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.sin()
    p = logits(q, k).softmax(-1)
    v.mul_(2.0)
    return p @ v


def write_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.sin()
    k.add_(1.0)
    return attend(q, k, v)


def write_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k = k.sin()
    out = attend(q, k, v)
    k.zero_()
    return out, k


def write_a_view_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k = k.sin()
    out = attend(q, k, v)
    k[:, 0].transpose(0, 1)[3:5] = 7.0
    return out, k


def write_out_argument_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k = k.sin()
    out = attend(q, k, v)
    torch.add(q, 1.0, out=k)
    return out, k


def write_out_argument_between(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k = k.sin()
    p = logits(q, k).softmax(-1)
    torch.add(q, 1.0, out=k)
    return p @ v, k


def write_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    out.mul_(2.0)
    return out


def write_view_of_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    out[:, :, 0] = 0.0
    return out


def write_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = logits(q, k).softmax(-1)
    p[..., 0] = 0.0
    return p @ v


def write_input_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k[:, :, -1] = q[:, :, -1]
    return attend(q, k, v)


def write_input_cache_after_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = logits(q, k)
    k[:, :, -1] = q[:, :, -1]
    v[:, :, -1] = q[:, :, -1]
    return scores.softmax(-1) @ v


WRITES = (
    write_between,
    write_values_between,
    write_before,
    write_after,
    write_a_view_after,
    write_out_argument_after,
    write_out_argument_between,
    write_output,
    write_view_of_output,
    write_probabilities,
    write_input_cache,
    write_input_cache_after_scores,
)
MUST_BE_REFUSED = (write_between, write_out_argument_between, write_probabilities, write_input_cache_after_scores)


@pytest.mark.parametrize("fn", WRITES, ids=lambda f: f.__name__)
def test_writes_keep_their_meaning(fn: Callable[..., Tensor]) -> None:
    report = compiled_like_eager(fn, without_grad())
    if fn in MUST_BE_REFUSED:
        assert_refused(report)
    assert only_site(report).verdict == "rewritten" or only_site(report).reason is not None


@pytest.mark.parametrize("fn", [write_before, write_output, write_view_of_output], ids=lambda f: f.__name__)
def test_writes_keep_their_gradients(fn: Callable[..., Tensor]) -> None:
    compiled_like_eager(fn, qkv())


def write_list(q: Tensor, k: Tensor, v: Tensor, after: bool = True) -> Tensor:
    """The list of blocks is a buffer that is written again after the mask has been made from it."""
    indices = choose(q, k).clone()
    mask = chosen_mask(indices)
    if after:
        indices.zero_()
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v + indices.sum() * 0


def test_written_list_is_not_read_after_the_write() -> None:
    compiled_like_eager(write_list, qkv())


def map_of_entries(q: Tensor, k: Tensor, v: Tensor, gone: bool) -> Tensor:
    """Blocks put into a map by rows of coordinates, one for each pick of each query; the map is then overwritten."""
    n, indices = k.shape[2], choose(q, k)
    entry = torch.arange(indices.numel())
    picked = torch.zeros(*indices.shape[:-1], n // BLOCK, dtype=torch.bool)
    picked[0, entry // (n * TOP_K), entry // TOP_K % n, indices.flatten()] = True
    i = torch.arange(n)
    mask = picked[..., i // BLOCK] & (i[:, None] >= i)
    if gone:
        picked.zero_()
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("n, gone, fires", [(LENGTH, True, True), (544, False, True), (544, True, False)])
def test_a_list_of_all_queries_is_not_searched_for_each(n: int, gone: bool, fires: bool) -> None:
    """The map is used where it still is; 4 * 544 * 2 entries are too many to be compared with each block of each query."""
    report = compiled_like_eager(partial(map_of_entries, gone=gone), qkv(n))
    if fires:
        assert_rewritten(report, "selected")
    else:
        assert_refused(report, ReasonKind.MASK)


# ------------------------------------------------------------------------------------------- gradients cut or changed


def detached_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(q, k).softmax(-1).detach() @ v


def detached_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).detach().masked_fill(~band(), -INF).softmax(-1) @ v


def detached_between_scale_and_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT.detach() * SCALE).masked_fill(~band(), -INF).softmax(-1) @ v


def detached_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q.detach(), k, v)


def detached_key_then_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k[:, :KV_HEADS].detach().repeat_interleave(2, 1), v[:, :KV_HEADS].repeat_interleave(2, 1))


def repeated_key_then_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k[:, :KV_HEADS].repeat_interleave(2, 1).detach(), v[:, :KV_HEADS].repeat_interleave(2, 1))


def detached_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v.detach())


def detached_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).detach() + q


def detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The stable softmax: what is subtracted from a whole row does not matter, nor does its gradient."""
    scores = logits(q, k)
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def scaled_by_data_in_the_forward_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return ((scores * 2).detach() - scores.detach() + scores).masked_fill(~band(), -INF).softmax(-1) @ v


def straight_through_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = logits(q, k).softmax(-1)
    hard = (p > 0.2).float()
    return ((hard - p).detach() + p) @ v


def straight_through_that_is_the_identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = (k * 2 - k).detach() + k - k.detach()
    return attend(q, k, v)


def no_grad_around_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        p = logits(q, k).softmax(-1)
    return p @ v


def no_grad_around_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.mT * SCALE
    return scores.masked_fill(~band(), -INF).softmax(-1) @ v


def no_grad_around_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k[:, :KV_HEADS].repeat_interleave(2, 1)
    return attend(q, k, v[:, :KV_HEADS].repeat_interleave(2, 1))


def no_grad_around_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        keys = k.mT
    return (q @ keys * SCALE).masked_fill(~band(), -INF).softmax(-1) @ v


def no_grad_around_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        q = q * SCALE
    return (q @ k.mT).masked_fill(~band(), -INF).softmax(-1) @ v


def no_grad_around_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = logits(q, k).softmax(-1)
    with torch.no_grad():
        out = p @ v
    return out + q


def no_grad_behind_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    with torch.no_grad():
        out = out.transpose(1, 2)
    return out.transpose(1, 2) + q


def no_grad_around_the_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        out = attend(q, k, v)
    return out + q


def enable_grad_inside_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            p = logits(q, k).softmax(-1)
        out = p @ v
    return out + q


def no_grad_around_mask_and_list(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        mask = chosen_mask(choose(q, k))
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v


def no_grad_between_the_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Logits before the block, the softmax behind it: where the block ends, the mode is that of before."""
    logit = q @ k.mT * SCALE
    with torch.no_grad():
        mask = chosen_mask(choose(q, k))
    return logit.masked_fill(~mask, -INF).softmax(-1) @ v


def no_grad_around_an_additive_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask takes its shape from scores of q and k, and no value."""
    with torch.no_grad():
        scores = q @ k.unflatten(2, (-1, BLOCK)).mean(3).mT
        bias = torch.full_like(scores, -INF).scatter_(-1, choose(q, k), 0.0).repeat_interleave(BLOCK, -1)
        bias = bias.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -INF)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


CUTS = (
    detached_probabilities,
    detached_logits,
    detached_between_scale_and_mask,
    detached_query,
    detached_key_then_repeated,
    repeated_key_then_detached,
    detached_values,
    detached_output,
    detached_maximum,
    scaled_by_data_in_the_forward_only,
    straight_through_probabilities,
    straight_through_that_is_the_identity,
    no_grad_around_probabilities,
    no_grad_around_logits,
    no_grad_around_repeat,
    no_grad_around_transpose,
    no_grad_around_scale,
    no_grad_around_output,
    no_grad_behind_output,
    no_grad_around_the_whole,
    enable_grad_inside_no_grad,
    no_grad_around_mask_and_list,
    no_grad_between_the_steps,
    no_grad_around_an_additive_mask,
)
STILL_FIRES = {
    detached_query: "sliding_window",
    detached_key_then_repeated: "sliding_window",
    detached_values: "sliding_window",
    detached_output: "sliding_window",
    detached_maximum: "sliding_window",
    no_grad_around_the_whole: "sliding_window",
    no_grad_around_mask_and_list: "selected",
    no_grad_between_the_steps: "selected",
    no_grad_around_an_additive_mask: "selected",
}
MUST_NOT_FIRE = (
    detached_probabilities,
    detached_logits,
    scaled_by_data_in_the_forward_only,
    straight_through_probabilities,
    no_grad_around_probabilities,
    no_grad_around_logits,
    no_grad_around_output,
)


def choose(q: Tensor, k: Tensor) -> Tensor:
    """(b, h, n, TOP_K) blocks; the own one is forced, so that no row is empty."""
    scores = q @ k.unflatten(2, (-1, BLOCK)).mean(3).mT
    blocks, own = torch.arange(k.shape[2] // BLOCK), torch.arange(q.shape[2])[:, None] // BLOCK
    return scores.masked_fill(blocks > own, -INF).masked_fill(blocks == own, INF).topk(TOP_K, -1).indices


def chosen_mask(indices: Tensor, n: int = LENGTH) -> Tensor:
    chosen = torch.zeros(*indices.shape[:-1], n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    return chosen.repeat_interleave(BLOCK, -1) & torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("fn", CUTS, ids=lambda f: f.__name__)
def test_cut_gradients_stay_cut(fn: Callable[..., Tensor]) -> None:
    report = compiled_like_eager(fn, qkv())
    if fn in STILL_FIRES:
        assert_rewritten(report, STILL_FIRES[fn])
    if fn in MUST_NOT_FIRE:
        assert report.rewritten == 0, why(report)


@pytest.mark.parametrize("fn", [no_grad_around_probabilities, no_grad_around_output], ids=lambda f: f.__name__)
def test_partly_without_gradients_is_the_reason(fn: Callable[..., Tensor]) -> None:
    assert_refused(compiled_like_eager(fn, qkv()), ReasonKind.GRADIENT)


def test_the_mode_of_a_checkpoint_is_that_of_its_call() -> None:
    """Logits without gradients, as the body is entered; the softmax with them."""

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logit = logits(q, k)
        with torch.enable_grad():
            return logit.softmax(-1) @ v

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            attended = checkpoint(body, q, k, v, use_reentrant=False)
        return attended + q

    assert compiled_like_eager(called, qkv()).rewritten == 0


# ------------------------------------------------------------------------------------------- hooks


def hook_on_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = logits(q, k).softmax(-1)
    p.register_hook(lambda g: g * 2)
    return p @ v


def hook_on_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    scores.register_hook(lambda g: g * 2)
    return scores.masked_fill(~band(), -INF).softmax(-1) @ v


def hook_on_repeated_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k[:, :KV_HEADS].repeat_interleave(2, 1)
    k.register_hook(lambda g: g * 2)
    return attend(q, k, v[:, :KV_HEADS].repeat_interleave(2, 1))


def hook_on_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    out.register_hook(lambda g: g * 2)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    "fn", [hook_on_probabilities, hook_on_logits, hook_on_repeated_keys, hook_on_output], ids=lambda f: f.__name__
)
def test_hooks_still_run(fn: Callable[..., Tensor]) -> None:
    compiled_like_eager(fn, qkv())


# ------------------------------------------------------------------------------------------- other users of the values


def returns_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = logits(q, k).softmax(-1)
    return p @ v, p


def returns_logits(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * SCALE
    return scores.masked_fill(~band(), -INF).softmax(-1) @ v, scores


def attends_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax, two contractions: values and keys are both averaged."""
    p = logits(q, k).softmax(-1)
    return p @ v, p @ k


def keys_are_values(q: Tensor, k: Tensor) -> Tensor:
    return attend(q, k, k)


def queries_are_keys(q: Tensor, v: Tensor) -> Tensor:
    return attend(q, q, v)


def all_are_one(q: Tensor) -> Tensor:
    return attend(q, q, q)


@pytest.mark.parametrize(
    "fn, n", [(returns_probabilities, 3), (returns_logits, 3), (keys_are_values, 2), (queries_are_keys, 2), (all_are_one, 1)]
)
def test_shared_values_are_rewritten(fn: Callable[..., Tensor], n: int) -> None:
    assert_rewritten(compiled_like_eager(fn, qkv()[:n]))


def test_two_contractions_of_one_softmax() -> None:
    report = compiled_like_eager(attends_twice, qkv())
    assert report.rewritten == 2, why(report)


# ------------------------------------------------------------------------------------------- around the site


class Doubled(torch.autograd.Function):
    """Identity whose gradient is doubled."""

    @staticmethod
    def forward(ctx: object, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 2 * g


def function_on_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, Doubled.apply(k), v)


def function_on_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Doubled.apply(q @ k.mT * SCALE).masked_fill(~band(), -INF).softmax(-1) @ v


def function_on_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Doubled.apply(logits(q, k).softmax(-1)) @ v


def function_on_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Doubled.apply(attend(q, k, v))


@pytest.mark.parametrize(
    "fn, fires",
    [(function_on_keys, True), (function_on_logits, False), (function_on_probabilities, False), (function_on_output, True)],
)
def test_custom_function_keeps_its_gradient(fn: Callable[..., Tensor], fires: bool) -> None:
    report = compiled_like_eager(fn, qkv())
    assert report.rewritten == fires, why(report)


def test_checkpoint_body_is_rewritten() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(lambda q, k, v: attend(q.sin(), k, v), q, k, v, use_reentrant=False)

    report = compiled_like_eager(fn, qkv())
    assert_rewritten(report)


def test_autocast_is_kept() -> None:
    """Products in bfloat16, softmax in float32; the op may only be more exact. Both are compared with float32."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v).float()

    report = compiled_like_eager(fn, qkv(), tolerance=2e-2)
    assert_rewritten(report)


def test_autocast_around_a_part() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            p = logits(q, k).softmax(-1)
        return p.float() @ v

    compiled_like_eager(fn, qkv(), tolerance=2e-2)


def test_dropout_is_refused_and_random_numbers_stay() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.dropout(logits(q, k).softmax(-1), 0.5) @ v

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="fsa", options={"inner": "eager", "profit": "always", "strict": True})
    q, k, v = without_grad()
    assert torch.equal(compiled(q, k, v), fn(q, k, v))


def test_dropout_on_probabilities_is_the_reason() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(logits(q, k).softmax(-1), 0.5) @ v

    torch._dynamo.reset()
    torch.compile(fn, backend="fsa", fullgraph=True, options={"inner": "eager", "strict": True, "profit": "always"})(
        *without_grad()
    )
    assert_refused(fsa_compile.last_report(), ReasonKind.DROPOUT)


def test_dropout_in_evaluation_is_nothing() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(logits(q, k).softmax(-1), 0.5, training=False) @ v

    assert_rewritten(compiled_like_eager(fn, qkv()))


# ------------------------------------------------------------------------------------------- terms that are not the op's


def row_bias(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A bias per query for every key: it shifts whole rows, and softmax does not see it."""
    return (q @ k.mT * SCALE + g[..., None]).masked_fill(~band(), -INF).softmax(-1) @ v


def row_bias_for_some_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(torch.arange(LENGTH) % 2 == 0, scores + g[..., None], scores).masked_fill(~band(), -INF).softmax(-1) @ v


def row_bias_times_mask(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    near = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) < 4).float()
    return (q @ k.mT * SCALE + g[..., None] * near).masked_fill(~band(), -INF).softmax(-1) @ v


def two_row_biases(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    even = torch.arange(LENGTH) % 2 == 0
    return (q @ k.mT * SCALE + torch.where(even, g[..., None], 2 * g[..., None])).masked_fill(~band(), -INF).softmax(-1) @ v


def scale_per_row(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT * g[..., None]).masked_fill(~band(), -INF).softmax(-1) @ v


def bias_per_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + g[..., None, :]).masked_fill(~band(), -INF).softmax(-1) @ v


def other_scale_for_some_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(torch.arange(LENGTH) % 2 == 0, scores * 2, scores).masked_fill(~band(), -INF).softmax(-1) @ v + 0 * g.sum()


@pytest.mark.parametrize(
    "fn, fires",
    [
        (row_bias, True),
        (row_bias_for_some_keys, False),
        (row_bias_times_mask, False),
        (two_row_biases, False),
        (scale_per_row, None),
        (bias_per_key, False),
        (other_scale_for_some_keys, False),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_terms_beside_the_product(fn: Callable[..., Tensor], fires: bool | None) -> None:
    q, k, v, g = randoms(
        (BATCH, HEADS, LENGTH, DIM), (BATCH, HEADS, LENGTH, DIM), (BATCH, HEADS, LENGTH, DIM), (BATCH, HEADS, LENGTH)
    )
    if fn is row_bias:
        g = g.detach()  # its gradient is rounding noise in eager, zero or none here
    report = compiled_like_eager(fn, (q, k, v, g))
    assert fires is None or report.rewritten == fires, why(report)


# ------------------------------------------------------------------------------------------- keys that are cut off


def compressed_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :, :5], v[:, :, :5]
    visible = (torch.arange(5) * 4 + 3) <= torch.arange(q.shape[2])[:, None]
    visible = visible | (torch.arange(5) < 1)
    return (q @ k.mT * SCALE).masked_fill(~visible, -INF).softmax(-1) @ v


def selected_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = chosen_mask(choose(q, k))
    k, v, mask = k[:, :, :20], v[:, :, :20], mask[..., :20]
    mask = mask | (torch.arange(20) < 1)
    return (q @ k.mT * SCALE).masked_fill(~mask, -INF).softmax(-1) @ v


def window_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :, :LENGTH], v[:, :, :LENGTH]
    return attend(q, k, v)


def window_offset(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k[:, :, 4 : 4 + LENGTH], v[:, :, 4 : 4 + LENGTH])


def values_offset(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k[:, :, :LENGTH], v[:, :, 4 : 4 + LENGTH])


def keys_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k[:, :, : LENGTH // 2].repeat(1, 1, 2, 1), v[:, :, : LENGTH // 2].repeat(1, 1, 2, 1))


def every_second_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, torch.cat((k, k), 2)[:, :, ::2][:, :, :LENGTH], torch.cat((v, v), 2)[:, :, ::2][:, :, :LENGTH])


def heads_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q[:, :2], k[:, 2:], v[:, 2:])


def dims_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q[..., :4], k[..., 4:], v)


def other_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.flip(-1), v.roll(1, -1))


def batch_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.cat((q, q.flip(2))), k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))


def keys_reinterpreted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.bfloat16().view(torch.float16).float()
    return attend(q, k, v)


def keys_through_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A cast narrower than the data, and back: the rounding is the model's, not ours to drop."""
    return attend(q, k.bfloat16().float(), v)


def keys_fake_quantised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.to(torch.float8_e4m3fn).float(), v)


def keys_made_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.int().float(), v)


@pytest.mark.parametrize(
    "fn",
    [
        compressed_slice,
        selected_slice,
        window_slice,
        window_offset,
        values_offset,
        keys_repeated,
        every_second_key,
        heads_slice,
        dims_slice,
        other_dims,
        batch_broadcast,
        keys_reinterpreted,
        keys_through_bfloat16,
        keys_fake_quantised,
        keys_made_integers,
    ],
    ids=lambda f: f.__name__,
)
def test_parts_of_keys_and_values(fn: Callable[..., Tensor]) -> None:
    """Whatever is taken for K and V, only what the user's code attends to counts."""
    longer = (compressed_slice, window_slice, window_offset, values_offset, keys_repeated, every_second_key)
    inputs = qkv(m=48 if fn in longer else LENGTH)
    if fn in (keys_reinterpreted, keys_made_integers, keys_fake_quantised):
        inputs = (inputs[0], inputs[1].detach(), inputs[2])
    compiled_like_eager(fn, inputs)
