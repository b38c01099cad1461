"""Forward and gradients of the ops against the float64 oracle: every shape, list, position and size of logit that is a trap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_oracle import NAMES, Problem, assert_right, errors, problem, relative_error, run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fsa_compile.kernels import cpu, cpu_selected, reference

OPS = ("selected_attention", "compressed_attention", "sliding_window_attention")

SHAPES: dict[str, dict[str, int]] = {
    "square": {},
    "one batch row, one head": {"b": 1, "hq": 1, "hkv": 1},
    "one key head": {"hq": 6, "hkv": 1},
    "a key head for each query head": {"hq": 3, "hkv": 3},
    "more keys than queries": {"n": 19, "m": 61},
    "more queries than keys": {"n": 61, "m": 19},
    "one query": {"n": 1, "m": 33},
    "one key": {"n": 7, "m": 1},
    "shorter than a block": {"n": 5, "m": 5},
    "not a multiple of the block": {"n": 37, "m": 37},
    "wide values": {"dk": 8, "dv": 24},
    "head dimension 1": {"dk": 1, "dv": 1},
    "empty batch": {"b": 0},
    "no queries": {"n": 0},
    "no keys": {"m": 0},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_shapes(name: str, shape: dict[str, int]) -> None:
    assert_right(problem(name, **shape))


@pytest.mark.parametrize("offset", [-50, -3, 0, 7, 100])
@pytest.mark.parametrize("name", OPS)
def test_positions(name: str, offset: int) -> None:
    p = problem(name, n=20, m=45, q_offset=offset)
    assert_right(p)
    per_row = torch.tensor([offset, 11])
    assert_right(p.with_arguments(q_offsets=per_row))
    assert_right(p.with_arguments(q_offsets=per_row.to(torch.int32)))


@pytest.mark.parametrize("name", ["selected_attention", "sliding_window_attention"])
def test_the_default_position_is_m_minus_n(name: str) -> None:
    p = problem(name, n=20, m=45)
    explicit, default = run(p.op, p.with_arguments(q_offset=25)), run(p.op, p)
    assert all(torch.equal(explicit[x], default[x]) for x in NAMES)


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize(("hi", "t"), [(2, 3), (4, 3), (8, 3), (2, 0), (4, 1), (2, 20)])
def test_rules_and_lists_per_head(rule: str, hi: int, t: int) -> None:
    for n, m in ((37, 37), (21, 53)):
        assert_right(problem("selected_attention", hq=8, hkv=2, n=n, m=m, rule=rule, hi=hi, t=t))


def test_a_list_is_a_set() -> None:
    tidy = torch.tensor([[0, 2, -1, -1, -1, -1]]).expand(1, 2, 40, 6)
    untidy = torch.tensor([[-1, 2, 0, -7, 2, 99]]).expand(1, 2, 40, 6)
    p = problem("selected_attention", b=1)
    results = [run(p.op, p.with_arguments(indices=x)) for x in (tidy, untidy, untidy.to(torch.int32), untidy.clone())]
    for result in results[1:]:
        for name in NAMES:
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-12, atol=1e-12)
    assert_right(p.with_arguments(indices=untidy))


@pytest.mark.parametrize("number", [2**31 - 1, 2**62, -(2**62)])
def test_huge_block_numbers_are_no_block(number: int) -> None:
    p = problem("selected_attention", b=1)
    p.arguments["indices"][..., 1] = number
    assert_right(p)


@pytest.mark.parametrize("rule", reference.RULES)
def test_rows_without_a_key(rule: str) -> None:
    p = problem("selected_attention", rule=rule)
    p.arguments["indices"][:, :, ::3] = -1
    p.arguments["indices"][0] = 77
    result = run(p.op, p)
    assert bool((result["lse"][0] == -torch.inf).all()) and bool((result["lse"][1, :, ::3] == -torch.inf).all())
    for name in ("out", "dq"):
        assert not result[name][0].any() and not result[name][1, :, ::3].any()
    assert not result["dk"][0].any() and not result["dv"][0].any()
    assert_right(p)


@pytest.mark.parametrize(
    ("stride", "last", "prefix"), [(1, 0, 0), (4, 3, 0), (4, 7, 3), (5, -1, 1), (16, 31, 0), (3, 1000, 2), (2, 1, 99)]
)
def test_compressed_rules(stride: int, last: int, prefix: int) -> None:
    assert_right(problem("compressed_attention", n=50, m=12, stride=stride, last=last, prefix=prefix))


@pytest.mark.parametrize("window", [1, 2, 39, 40, 1000])
def test_windows(window: int) -> None:
    assert_right(problem("sliding_window_attention", window=window))


@pytest.mark.parametrize("name", OPS)
def test_any_strides(name: str) -> None:
    p = problem(name, dk=8, dv=8)
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x + 1], -1)[..., 0],
        lambda x: x[:1, :1].expand_as(x),
    ):
        changed = Problem(name, layout(p.q), layout(p.k), layout(p.v), p.arguments)
        assert_right(changed)
        out, lse = changed.op(changed.q, changed.k, changed.v, **p.arguments)
        assert out.is_contiguous() and lse.is_contiguous()


def test_one_list_per_query_block_as_an_expanded_view() -> None:
    coarse = torch.randint(-1, 5, (2, 2, 5, 1, 3), generator=torch.Generator().manual_seed(0))
    assert_right(problem("selected_attention").with_arguments(indices=coarse.expand(-1, -1, -1, 8, -1).flatten(2, 3)))
    assert_right(problem("selected_attention").with_arguments(indices=coarse[:1, :, :1, 0].expand(2, -1, 40, -1)))


@pytest.mark.parametrize("name", OPS)
def test_small_scratch_cuts_the_work_and_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(name, b=3, hq=8, hkv=2, n=70, m=70, **({"hi": 4} if name == "selected_attention" else {}))
    for scratch in (1, 1 << 9, 1 << 13):
        monkeypatch.setattr(cpu, "SCRATCH_ELEMENTS", scratch)
        monkeypatch.setattr(cpu, "CHUNK", 16)
        monkeypatch.setattr(cpu_selected, "PARTIAL_ELEMENTS", scratch)
        monkeypatch.setattr(cpu_selected, "TILE_ELEMENTS", scratch)
        monkeypatch.setattr(cpu_selected, "MATRIX_ROWS", 8)
        assert_right(p)


@pytest.mark.parametrize("rule", reference.RULES)
def test_plans_for_devices_that_the_host_must_not_read(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_selected, "reads_freely", lambda device: False)
    for n, m in ((37, 37), (21, 53), (1, 9)):
        assert_right(problem("selected_attention", n=n, m=m, rule=rule))


@pytest.mark.parametrize("deviation", [1, 16, 36, 64])
@pytest.mark.parametrize("name", OPS)
def test_large_logits_and_an_outlier_in_token_0(name: str, deviation: int) -> None:
    """No worse than the dense oracle in float32 itself: 3 times its error, and 1e-6 where it happens to be exact."""
    p = problem(name, n=96, m=96, dk=64, dv=64)
    k = p.k * deviation
    k[:, :, 0] *= 12
    p = Problem(name, p.q, k, p.v, p.arguments).to(torch.float32)
    exact, dense = run(p.oracle, p.to(torch.float64)), run(p.oracle, p)
    for key, error in errors(p).items():
        assert error <= 3 * relative_error(dense[key], exact[key]) + 1e-6, key


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_dense_attention_in_it(name: str, dtype: torch.dtype) -> None:
    """Same rounded operands, same mask: SDPA's own error against float64 is the bound. Ten per cent for luck."""
    p = problem(name, n=128, m=128, dk=64, dv=64).to(dtype)
    if name == "selected_attention":
        p.arguments["indices"][..., 0] = 0  # SDPA's value of a row without keys is not the ops'.
    if name == "compressed_attention":
        p = p.with_arguments(prefix=1)

    def dense(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        visible = p.visible.repeat_interleave(4 // p.visible.shape[1], dim=1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=p.arguments["scale"], enable_gqa=True)
        return out, torch.zeros(q.shape[:3])

    exact = run(p.oracle, p.to(torch.float64), lse_weight=0.0)
    ours, theirs = run(p.op, p, lse_weight=0.0), run(dense, p, lse_weight=0.0)
    for key in ("out", "dq", "dk", "dv"):
        assert ours[key].dtype == dtype
        assert relative_error(ours[key], exact[key]) <= 1.1 * relative_error(theirs[key], exact[key]), key
