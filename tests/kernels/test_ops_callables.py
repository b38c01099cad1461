"""The public callables of `fsa_compile.ops`: defaults, position arguments, and one clear sentence per wrong argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fsa_compile import ops
from fsa_compile.kernels import reference


_random = torch.Generator().manual_seed(0)
Q = torch.randn(2, 4, 12, 8, generator=_random)
K, V = torch.randn(2, 2, 2, 20, 8, generator=_random)
INDICES = torch.randint(-1, 5, (2, 2, 12, 3), generator=_random)


def selected(**changes: Any) -> tuple[Tensor, Tensor]:
    return ops.selected_attention(**{"q": Q, "k": K, "v": V, "indices": INDICES, "block_size": 4, "return_lse": True, **changes})


def compressed(**changes: Any) -> tuple[Tensor, Tensor]:
    return ops.compressed_attention(**{"q": Q, "k_cmp": K, "v_cmp": V, "stride": 2, "last": 3, "return_lse": True, **changes})


def window(**changes: Any) -> tuple[Tensor, Tensor]:
    return ops.sliding_window_attention(**{"q": Q, "k": K, "v": V, "window": 5, "return_lse": True, **changes})


def test_defaults_are_those_of_the_reference() -> None:
    scale = 8**-0.5
    pairs = (
        (selected(), reference.selected_attention(Q, K, V, INDICES, 4, scale)),
        (window(), reference.sliding_window_attention(Q, K, V, 5, scale)),
        (compressed(), reference.compressed_attention(Q, K, V, scale, stride=2, last=3)),
    )
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("call", [selected, compressed, window])
def test_positions_as_int_and_as_tensor_agree(call: Callable[..., tuple[Tensor, Tensor]]) -> None:
    apart = [call(q_offset=offset) for offset in (3, 6)]
    together = call(q_offset=torch.tensor([3, 6]))
    for i in range(2):
        for mine, other in zip(together, apart[i]):
            torch.testing.assert_close(mine[i], other[i])
    assert not torch.equal(apart[0][0], apart[1][0])


@pytest.mark.parametrize("call", [selected, compressed, window])
def test_out_alone_without_return_lse(call: Callable[..., Any]) -> None:
    assert torch.equal(call(return_lse=False), call()[0])


@pytest.mark.parametrize("call", [selected, compressed, window])
def test_compiles_in_one_graph(call: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q_offset=torch.tensor([3, 6])), call(q_offset=torch.tensor([3, 6])), rtol=0, atol=0)


WRONG: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (selected, {"q": torch.zeros(2, 4, 12, 8, dtype=torch.int64)}, TypeError, "q must be float16, bfloat16, float32 or float64"),
    (selected, {"q": torch.zeros(4, 12, 8)}, ValueError, r"q must be \(b, hq, n, dk\)"),
    (selected, {"k": torch.zeros(2, 2, 20, 8).double()}, TypeError, "k must have q's dtype"),
    (selected, {"k": torch.zeros(1, 2, 20, 8)}, ValueError, r"k must be \(b, hkv, m, d\) with b = 2"),
    (selected, {"k": torch.zeros(2, 2, 20, 9)}, ValueError, "k must have q's head dimension 8, got 9"),
    (selected, {"k": torch.zeros(2, 3, 20, 8)}, ValueError, "k must have a number of heads that divides q's 4, got 3"),
    (selected, {"k": torch.zeros(2, 0, 20, 8)}, ValueError, "k must have a number of heads that divides q's 4, got 0"),
    (selected, {"k": torch.zeros(2, 2, 20, 8, device="meta")}, ValueError, "k must be on q's device cpu, got meta"),
    (selected, {"v": torch.zeros(2, 2, 19, 8)}, ValueError, r"v must have k's sizes \(2, 2, 20\)"),
    (selected, {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    (selected, {"rule": "past"}, ValueError, "rule must be one of 'causal', 'listed', 'diagonal', got 'past'"),
    (selected, {"indices": torch.zeros(2, 2, 12, 3)}, TypeError, "indices must be int32 or int64"),
    (selected, {"indices": torch.zeros(2, 2, 11, 3, dtype=torch.int64)}, ValueError, r"indices must be \(b, hi, n, t\) with"),
    (selected, {"indices": torch.zeros(2, 1, 12, 3, dtype=torch.int64)}, ValueError, "that 2 divides and that divides 4, got 1"),
    (selected, {"q_offset": torch.zeros(3, dtype=torch.int64)}, ValueError, r"q_offset must be an int or a tensor of shape"),
    (selected, {"q_offset": torch.zeros(2)}, TypeError, "q_offset must be int32 or int64"),
    (compressed, {"k_cmp": torch.zeros(2, 3, 20, 8)}, ValueError, "k_cmp must have a number of heads"),
    (compressed, {"v_cmp": torch.zeros(2, 2, 19, 8)}, ValueError, "v_cmp must have k_cmp's sizes"),
    (compressed, {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    (compressed, {"prefix": -1}, ValueError, "prefix must be at least 0, got -1"),
    (compressed, {"q_offset": None}, ValueError, "q_offset must be an int"),
    (window, {"window": 0}, ValueError, "window must be at least 1, got 0"),
    (window, {"v": torch.zeros(2, 2, 20, 8).half()}, TypeError, "v must have q's dtype"),
]


@pytest.mark.parametrize(("call", "wrong", "error", "sentence"), WRONG, ids=[f"{c.__name__}-{m[:24]}" for c, _, _, m in WRONG])
def test_wrong_arguments(call: Callable[..., Any], wrong: dict[str, Any], error: type[Exception], sentence: str) -> None:
    call()
    with pytest.raises(error, match=sentence):
        call(**wrong)
