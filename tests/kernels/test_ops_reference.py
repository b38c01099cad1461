"""The oracle against the sentences of its documentation, one query and one key at a time in plain integers."""

from __future__ import annotations

import math

import pytest
import torch
from ops_oracle import problem

from fsa_compile.kernels import reference


@pytest.mark.parametrize("offset", [-3, 0, 5])
@pytest.mark.parametrize("rule", reference.RULES)
def test_selected_visibility_is_what_its_documentation_says(rule: str, offset: int) -> None:
    n, m, block_size = 11, 14, 4
    indices = torch.randint(-2, 6, (2, 3, n, 2), generator=torch.Generator().manual_seed(0))
    positions = reference.query_positions(n, offset, None, indices.device)
    visible = reference.selected_visibility(indices, positions, block_size, m, rule)
    assert visible.any() and not visible.all()
    for b, h, i, p in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(n), torch.arange(m)).tolist():
        listed = p // block_size in indices[b, h, i].tolist()
        if rule == "causal":
            expected = listed and p <= i + offset
        elif rule == "diagonal":
            expected = listed and (p <= i + offset or p // block_size != (i + offset) // block_size)
        else:
            expected = listed
        assert visible[b, h, i, p] == expected, (b, h, i, p)


def test_compressed_and_window_visibility_are_what_their_documentation_says() -> None:
    n, m, window, stride, last, prefix = 13, 10, 4, 2, 3, 2
    offsets = torch.tensor([-2, 0, 6])
    positions = reference.query_positions(n, 99, offsets, offsets.device)
    compressed = reference.compressed_visibility(positions, m, stride, last, prefix)
    banded = reference.sliding_window_visibility(positions, m, window)
    for b, i, p in torch.cartesian_prod(torch.arange(3), torch.arange(n), torch.arange(m)).tolist():
        position = i + offsets[b].item()
        assert compressed[b, 0, i, p] == (p < prefix or (p - prefix) * stride + last <= position)
        assert banded[b, 0, i, p] == (position - window < p <= position)


def test_masked_attention_is_softmax_over_the_visible_keys() -> None:
    p = problem("sliding_window_attention", b=1, hq=4, hkv=2, n=6, m=6, dk=3, dv=2)
    visible = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    visible[0, 1, 3] = False
    out, lse = reference.masked_attention(p.q, p.k, p.v, visible, 0.7)
    for h in range(4):
        for i in range(6):
            keys = [j for j in range(6) if visible[0, h // 2, i, j]]
            logits = [0.7 * float(p.q[0, h, i] @ p.k[0, h // 2, j]) for j in keys] if keys else []
            total = sum(math.exp(x) for x in logits)
            expected = sum((math.exp(x) / total * p.v[0, h // 2, j] for x, j in zip(logits, keys)), torch.zeros(2))
            torch.testing.assert_close(out[0, h, i], expected.double())
            assert math.isclose(lse[0, h, i], math.log(total), rel_tol=1e-12) if keys else lse[0, h, i] == -math.inf


@pytest.mark.parametrize("m", [0, 5])
def test_a_row_without_keys_has_zero_gradients_in_the_oracle(m: int) -> None:
    q, k, v = (torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = reference.masked_attention(q, k[:, :, :m], v[:, :, :m], torch.zeros(1, 1, 5, m, dtype=torch.bool), 1.0)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())
    for grad in torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))
