"""What follows an attention may be a view that needs the strides that its output had."""

from __future__ import annotations

import pytest
import torch

import fsa_compile

B, H, N, D = 2, 4, 32, 8
ENDINGS = {
    "contiguous-view": lambda p, v: (p @ v).transpose(1, 2).contiguous().view(B, -1, H * D),
    "clone-view": lambda p, v: (p @ v).transpose(1, 2).clone(memory_format=torch.contiguous_format).view(B, -1, H * D),
    "clone": lambda p, v: (p @ v).transpose(1, 2).clone().transpose(1, 2).view(B, H, -1),
    "view of the product": lambda p, v: (p @ v).view(B, H, -1),
    "view of a transposed view": lambda p, v: (p @ v).transpose(1, 2).view(B, -1, H, 2, D // 2),
    "einsum-view": lambda p, v: torch.einsum("bhij,bhjd->bihd", p, v).contiguous().view(B, -1, H * D),
    "einsum-flat heads": lambda p, v: torch.einsum("bhij,bhjd->bhid", p, v).view(B * H, -1, D),
    "folded": lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(B, H, -1, D).view(B, -1),
    "as strided": lambda p, v: (p @ v).transpose(1, 2).contiguous().as_strided((B, N * H * D), (N * H * D, 1)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_views_behind_the_attention(ending, dynamic):
    """The output, its strides and the gradients are those of eager."""

    def attend(q, k, v):
        i = torch.arange(q.shape[2])
        seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 6)
        p = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~seen, float("-inf")).softmax(-1)
        return ENDINGS[ending](p, v)

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D, generator=g, requires_grad=True) for _ in range(3))
    if dynamic:
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 2)
    want = attend(q, k, v)
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "profit": "always", "strict": True}
    got = torch.compile(attend, backend="fsa", options=options, fullgraph=True)(q, k, v)
    assert fsa_compile.last_report().rewritten == 1
    assert got.shape == want.shape and got.stride() == want.stride()
    assert (got - want).norm() < 1e-5 * want.norm()
    cotangent = torch.randn(want.shape, generator=g)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), cotangent) for y in (got, want))):
        assert (a - b).norm() <= 1e-5 * b.norm()
