"""What a spelling and a mutant are, and the few helpers that all families share.

The body of a spelling is written the way a user would write it, except that the integers, comparisons and axes that a
mutant changes are keyword arguments (`sees=operator.ge`, `axis=-1`, `window=16`). Dynamo resolves them while tracing, so
that the graph of the parent is exactly the graph of the plain code.

Sizes: b 2, hq 4, hkv 2, n 96 unless stated, d 16, block 8, top-k 3: a quarter of the blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 96, 16
GROUP = HEADS // KV_HEADS
BLOCK, TOP_K = 8, 3
SCALE = DIM**-0.5

QKV = ((BATCH, HEADS, LENGTH, DIM), (BATCH, KV_HEADS, LENGTH, DIM), (BATCH, KV_HEADS, LENGTH, DIM))
"""Shapes of q, k, v with heads before positions."""
QKV_BNHD = ((BATCH, LENGTH, HEADS, DIM), (BATCH, LENGTH, KV_HEADS, DIM), (BATCH, LENGTH, KV_HEADS, DIM))
"""Shapes of q, k, v with positions before heads."""

Problem = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""A function or module, and the leaf tensors to call it with."""


class Kind(enum.Enum):
    """The classes in which attention of this family is found in the wild."""

    S1 = "dense block mask"
    S2 = "per-query gather"
    S3 = "one selection for all queries"
    S4 = "additive gate"
    S5 = "mask into SDPA"
    S6 = "flex_attention"
    S8 = "token top-k"
    S9 = "look-alike"
    WINDOW = "sliding window"
    COMPRESSED = "compressed keys"
    LAYER = "whole layer"


@dataclass(frozen=True)
class Mutant:
    """A spelling with one integer, one comparison or one axis changed.

    Args:
        name: What was changed.
        changes: Keyword arguments for the spelling's body.
        must_refuse: No op can express it, so one branch of the parent must stay the user's code. Where this is False, the
            mutant may well be rewritten, with its own parameters: a window of 15 is a window.
    """

    name: str
    changes: Mapping[str, Any]
    must_refuse: bool = False


@dataclass(frozen=True)
class Spelling:
    """One way of writing one or more branches.

    Args:
        name: Name of the body.
        kind: Its class.
        build: Builds function and inputs from a generator and the changes of a mutant.
        roles: The sites that must be rewritten.
        mutants: Its near misses.
    """

    name: str
    kind: Kind
    build: Callable[..., Problem]
    roles: tuple[str, ...]
    mutants: tuple[Mutant, ...]

    def make(self, seed: int, mutant: Mutant | None = None) -> Problem:
        """The function and its inputs (float32 leaves that need grad); a mutant gets its parent's inputs."""
        return self.build(torch.Generator().manual_seed(seed), **(mutant.changes if mutant else {}))


def randoms(generator: torch.Generator, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Standard normal float32 leaves that need grad."""
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def from_function(body: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> Callable[..., Problem]:
    """`Spelling.build` for a function of random tensors."""

    def build(generator: torch.Generator, **changes: Any) -> Problem:
        return (lambda *inputs: body(*inputs, **changes)), randoms(generator, shapes)

    return build


def from_module(module: Callable[..., nn.Module], shapes: tuple[tuple[int, ...], ...]) -> Callable[..., Problem]:
    """`Spelling.build` for a module; all parameters are drawn anew, so that no default can hide an error."""

    def build(generator: torch.Generator, **changes: Any) -> Problem:
        model = module(**changes)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        return model, randoms(generator, shapes)

    return build


def spell(
    body: Callable[..., Tensor],
    kind: Kind,
    *mutants: Mutant,
    role: str = "selected",
    shapes: tuple[tuple[int, ...], ...] = QKV,
) -> Spelling:
    """A spelling of one branch whose body is a function."""
    return Spelling(body.__name__, kind, from_function(body, shapes), (role,), mutants)


def keep(x: Tensor) -> Tensor:
    """No change: the parent of `rolled`, `flipped` and `swapped`."""
    return x


def rolled(x: Tensor) -> Tensor:
    """(..., n, d) moved by one position."""
    return x.roll(1, -2)


def flipped(x: Tensor) -> Tensor:
    """(..., n, d) in reverse order."""
    return x.flip(-2)


def swapped(x: Tensor) -> Tensor:
    """(b, h, ...) with its heads in reverse order."""
    return x.flip(1)


def interleave(x: Tensor, groups: int) -> Tensor:
    """(b, hkv, ...) to (b, hq, ...): query head h reads key head h // groups."""
    return x.repeat_interleave(groups, dim=1)


def tile(x: Tensor, groups: int) -> Tensor:
    """(b, hkv, ...) to (b, hq, ...): query head h reads key head h % hkv, the classic mistake."""
    return x.repeat(1, groups, *(1 for _ in x.shape[2:]))


def choose_blocks(q: Tensor, k: Tensor, *, block: int = BLOCK, topk: int = TOP_K, force_own: bool = False) -> Tensor:
    """Selected blocks of each query and key head, by the mean query of the group and the mean key of the block.

    Blocks of the future score -inf: an early query that has fewer than `topk` blocks to choose from still gets some of them as
    surplus picks, and the caller's causal mask has to hide them.

    Args:
        q: (b, hq, n, d).
        k: (b, hkv, n, d).
        force_own: Give the query's own block the score +inf.

    Returns:
        (b, hkv, n, topk) int64.
    """
    pooled = k.unflatten(2, (-1, block)).mean(3)
    query = q.unflatten(1, (k.shape[1], -1)).mean(2)
    scores = query @ pooled.transpose(-1, -2)
    own = torch.arange(q.shape[2])[:, None] // block
    blocks = torch.arange(pooled.shape[2])
    scores = scores.masked_fill(blocks > own, float("-inf"))
    if force_own:
        scores = scores.masked_fill(blocks == own, float("inf"))
    return scores.topk(topk, dim=-1).indices
