"""Writes through an alias, ops of other libraries, logits that are not finite: each was once read as something else."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .end_to_end import LENGTH, WINDOW, compiled_like_eager, qkv

SCALE = 0.3


def without_grad() -> tuple[Tensor, ...]:
    """q, k, v that need no gradient: what is compared is the output."""
    return tuple(t.detach() for t in qkv())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def window(position: Tensor) -> Tensor:
    """The band of `WINDOW` keys, in positions that a write may have changed since."""
    i, j = torch.arange(LENGTH)[:, None], position[None, :]
    return ((j <= i) & (i - j < WINDOW)) | (i == torch.arange(LENGTH))


AUGMENTED = ("ifloordiv", "imod", "ilshift", "irshift", "ixor", "ipow", "iadd", "isub", "imul")


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmented_assignment_through_a_view(name: str) -> None:
    write = getattr(operator, name)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(LENGTH)
        view = position.view(LENGTH)
        view = write(view, 2)
        return attend(q, k, v, window(position))

    compiled_like_eager(fn, without_grad())


def test_out_argument_is_a_view() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(LENGTH)
        torch.mul(torch.arange(LENGTH), 2, out=position.view(LENGTH))
        return attend(q, k, v, window(position))

    compiled_like_eager(fn, without_grad())


def test_foreach_writes_all_its_tensors() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        other, position = torch.arange(LENGTH), torch.arange(LENGTH)
        torch._foreach_add_([other, position.view(LENGTH)], 3)
        return attend(q, k, v, window(position))

    compiled_like_eager(fn, without_grad())


@torch.library.custom_op("fsa_tests::clone", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, gradient: gradient * 2)


def test_custom_op_with_the_name_of_an_aten_op() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, torch.ops.fsa_tests.clone(k), v, window(torch.arange(LENGTH)))

    compiled_like_eager(fn, qkv())


@pytest.mark.parametrize("shift", [torch.inf, torch.nan, -torch.inf])
def test_logits_shifted_by_what_is_not_finite(shift: float) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT * SCALE).masked_fill(~window(torch.arange(LENGTH)), -torch.inf) + shift).softmax(-1) @ v

    compiled_like_eager(fn, without_grad())


ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda t: t.bfloat16().float(),
    "float16": lambda t: t.half().float(),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_keys_rounded_on_the_way(name: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, ROUND_TRIPS[name](k), v, window(torch.arange(LENGTH)))

    report = compiled_like_eager(fn, without_grad())
    assert report.rewritten == 1


def test_masks_joined_by_operators_are_no_writes() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(LENGTH)
        return attend(q, k, v, operator.and_(i <= i[:, None], i[:, None] - i < WINDOW))

    assert compiled_like_eager(fn, qkv()).rewritten == 1
