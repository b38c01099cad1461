"""S1 with matrices of zeros and ones: the mask of blocks times the map from blocks to tokens, compared with zero."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import BLOCK, GROUP, SCALE, TOP_K, Kind, Mutant, choose_blocks, keep, rolled, spell

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


def token_map(n: int, block: int = BLOCK, shift: int = 0) -> Tensor:
    """(n // block, n): one where a token lies in a block."""
    return ((torch.arange(n) + shift) // block == torch.arange(n // block)[:, None]).float()


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sees: Comparison) -> Tensor:
    """Attention over (b, hkv, n, n) truths, made causal."""
    i = torch.arange(k.shape[2])
    visible = (visible & sees(i[:, None], i)).repeat_interleave(GROUP, 1)
    logits = (q @ k.repeat_interleave(GROUP, 1).mT * SCALE).masked_fill(~visible, torch.finfo(q.dtype).min)
    return logits.softmax(-1) @ v.repeat_interleave(GROUP, 1)


def without_token(e: Tensor) -> Tensor:
    """The map without token 17."""
    return e.masked_fill(torch.arange(e.shape[-1]) == 17, 0.0)


def times_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = BLOCK,
    shift: int = 0,
    least: float = 0.0,
    change: Change = keep,
    sees: Comparison = operator.ge,
) -> Tensor:
    """A mask of blocks in floating point, times the map."""
    n = k.shape[2]
    indices = choose_blocks(q, k, block=block, force_own=True)
    chosen = torch.zeros(*indices.shape[:-1], n // block).scatter(-1, indices, 1.0)
    return attend(q, k, v, (chosen @ change(token_map(n, block, shift))) > least, sees)


def one_hot_to_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int = TOP_K,
    weight: float = 1.0,
    least: float = 0.5,
    change: Change = keep,
    sees: Comparison = operator.ge,
) -> Tensor:
    """One-hot entries of the list, summed over the list and mapped to tokens by one einsum."""
    n = k.shape[2]
    entries = F.one_hot(choose_blocks(q, k, topk=topk, force_own=True), n // BLOCK).to(q.dtype)
    tokens = torch.einsum("bhqts,sk->bhqk", entries, change(token_map(n)) * weight)
    return attend(q, k, v, tokens > least, sees)


def counts_to_tokens(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = BLOCK, change: Change = keep, twice: bool = False, sees: Comparison = operator.ge
) -> Tensor:
    """How often each block is listed, times a Kronecker product; in bfloat16."""
    n = k.shape[2]
    entries = F.one_hot(choose_blocks(q, k, block=block, force_own=True), n // block)
    counts = entries.sum(-2).to(torch.bfloat16)
    to_tokens = torch.kron(torch.eye(n // block), torch.ones(1, block)).to(torch.bfloat16)
    met = counts @ change(to_tokens)
    return attend(q, k, v, met > 1 if twice else met.bool(), sees)


def pairs(
    q: Tensor, k: Tensor, v: Tensor, *, first: int = 0, behind: int = 0, change: Change = keep, sees: Comparison = operator.ge
) -> Tensor:
    """Each block and token paired, a block from its first token to the one after its last; any pair."""
    n = k.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    chosen = torch.zeros(*indices.shape[:-1], n // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    start, i = torch.arange(0, n, BLOCK)[:, None], torch.arange(n)
    inside = (i >= start + first) & (i < start + BLOCK + behind)
    return attend(q, k, change(v), (chosen[..., None] & inside).any(-2), sees)


SPELLINGS = (
    spell(
        times_map,
        Kind.S1,
        Mutant("blocks begin one token early", {"shift": 1}, must_refuse=True),
        Mutant("a token in no block", {"change": without_token}, must_refuse=True),
        Mutant("more than one block", {"least": 1.0}, must_refuse=True),
        Mutant("the block before", {"change": rolled}),
        Mutant("blocks of 4", {"block": 4}),
    ),
    spell(
        one_hot_to_tokens,
        Kind.S1,
        Mutant("two blocks", {"topk": 2}),
        Mutant("weights below the threshold", {"weight": 0.5}),
        Mutant("a token in no block", {"change": without_token}, must_refuse=True),
        Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
    ),
    spell(
        counts_to_tokens,
        Kind.S1,
        Mutant("listed twice", {"twice": True}, must_refuse=True),
        Mutant("blocks of 4", {"block": 4}),
        Mutant("the block before", {"change": rolled}),
    ),
    spell(
        pairs,
        Kind.S1,
        Mutant("without the first token", {"first": 1}, must_refuse=True),
        Mutant("the first token of the next block", {"behind": 1}, must_refuse=True),
        Mutant("rolled values", {"change": rolled}),
    ),
)
