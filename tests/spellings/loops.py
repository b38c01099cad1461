"""Python loops that are unrolled into few sites, and chunks of queries that start somewhere among the keys."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .spelling import (
    BLOCK,
    GROUP,
    HEADS,
    LENGTH,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    Spelling,
    choose_blocks,
    flipped,
    interleave,
    keep,
    rolled,
    spell,
)

Comparison = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]

CHUNK, START = 32, 48


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float = SCALE) -> Tensor:
    """Dense attention behind a mask, any number of leading dimensions."""
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf")).softmax(-1) @ v


def table(indices: Tensor, blocks: int) -> Tensor:
    """(..., n, t) block numbers to (..., n, blocks * B) truths."""
    chosen = torch.zeros(*indices.shape[:-1], blocks, dtype=torch.bool).scatter(-1, indices, True)
    return chosen.repeat_interleave(BLOCK, -1)


def head_loop(
    q: Tensor, k: Tensor, v: Tensor, *, sees: Comparison = operator.ge, shift: int = 0, scale: float = SCALE, values: Change = keep
) -> Tensor:
    """One query head after the other, (b, n, d) each; `shift` takes the selection of another head."""
    n = q.shape[2]
    indices = choose_blocks(q, k, force_own=True)
    causal = sees(torch.arange(n)[:, None], torch.arange(n))
    out = []
    for h in range(HEADS):
        visible = table(indices[:, (h // GROUP + shift) % 2], n // BLOCK) & causal
        out.append(attend(q[:, h], k[:, h // GROUP], values(v[:, h // GROUP]), visible, scale))
    return torch.stack(out, 1)


def row_and_head_loop(q: Tensor, k: Tensor, v: Tensor, *, window: int = 16, sees: Comparison = operator.ge, head: int = 0) -> Tensor:
    """One batch row and one head after the other, (n, d) each, as the simplest implementations have it."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    visible = sees(i, j) & (i - j < window)
    rows = []
    for b in range(2):
        heads = [attend(q[b, h], k[b, h // GROUP], v[b, (h // GROUP + head) % 2], visible) for h in (0, 2)]
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def last_queries(q: Tensor, k: Tensor, v: Tensor, *, window: int = 16, behind: int = 0, sees: Comparison = operator.ge) -> Tensor:
    """The last queries against all keys, as with a cache."""
    q, n = q[:, :, -CHUNK:], k.shape[2]
    i, j = torch.arange(CHUNK)[:, None] + (n - CHUNK) - behind, torch.arange(n)
    return attend(q, interleave(k, GROUP), interleave(v, GROUP), sees(i, j) & (i - j < window))


def chunk_of_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int = START,
    first: int = START,
    topk: int = TOP_K,
    sees: Comparison = operator.le,
    chosen: Change = keep,
) -> Tensor:
    """Some queries against all keys with a selection; `start` is where the mask takes them to stand."""
    n = k.shape[2]
    indices = chosen(choose_blocks(q, k, topk=topk, force_own=True))[:, :, first : first + CHUNK]
    visible = table(indices, n // BLOCK) & sees(torch.arange(n), torch.arange(start, start + CHUNK)[:, None])
    k, v = interleave(k, GROUP), interleave(v, GROUP)
    return attend(q[:, :, first : first + CHUNK], k, v, interleave(visible, GROUP))


def chunk_of_gathers(
    q: Tensor, k: Tensor, v: Tensor, *, start: int = START, scale: float = SCALE, values: Change = keep
) -> Tensor:
    """The same with gathered keys."""
    b, hkv, n, d = k.shape
    indices = choose_blocks(q, k, force_own=True)[:, :, START : START + CHUNK]
    position = (indices[..., None] * BLOCK + torch.arange(BLOCK)).flatten(3)
    rows = torch.arange(b)[:, None, None, None], torch.arange(hkv)[:, None, None], position
    keys, vals = (x[rows].unsqueeze(2) for x in (k, values(v)))
    visible = position <= torch.arange(start, start + CHUNK)[:, None]
    q = q[:, :, START : START + CHUNK].unflatten(1, (hkv, GROUP))
    logits = torch.einsum("bhgid,bhgijd->bhgij", q, keys.expand(-1, -1, GROUP, -1, -1, -1)) * scale
    weights = logits.masked_fill(~visible.unsqueeze(2), float("-inf")).softmax(-1)
    return torch.einsum("bhgij,bhgijd->bhgid", weights, vals.expand(-1, -1, GROUP, -1, -1, -1)).flatten(1, 2)


def loop_over_chunks(q: Tensor, k: Tensor, v: Tensor, *, window: int = 16, late: int = 0, order: Change = keep) -> Tensor:
    """All queries, a chunk at a time; `late` moves what the chunks believe to be their place."""
    n = k.shape[2]
    k, v = interleave(k, GROUP), interleave(order(v), GROUP)
    out = []
    for start in range(0, LENGTH, CHUNK):
        i, j = torch.arange(start, start + CHUNK)[:, None] + late, torch.arange(n)
        out.append(attend(q[:, :, start : start + CHUNK], k, v, (j <= i) & (i - j < window)))
    return torch.cat(out, 2)


SPELLINGS: tuple[Spelling, ...] = (
    replace(
        spell(
            head_loop,
            Kind.S1,
            Mutant("strict causality", {"sees": operator.gt}, must_refuse=True),
            Mutant("the selection of the other head", {"shift": 1}),
            Mutant("scale doubled", {"scale": 2 * SCALE}),
            Mutant("values in reverse order", {"values": flipped}),
        ),
        roles=("selected",) * HEADS,
    ),
    replace(
        spell(
            row_and_head_loop,
            Kind.WINDOW,
            Mutant("window 15", {"window": 15}),
            Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
            Mutant("values of the other head", {"head": 1}),
        ),
        roles=("sliding_window",) * 4,
    ),
    spell(
        last_queries,
        Kind.WINDOW,
        Mutant("window 15", {"window": 15}),
        Mutant("one position back", {"behind": 1}),
        Mutant("one position ahead", {"behind": -1}, must_refuse=True),
        Mutant("sees the future", {"sees": operator.ne}, must_refuse=True),
        role="sliding_window",
    ),
    spell(
        chunk_of_queries,
        Kind.S1,
        Mutant("one position back", {"start": START - 1}),
        Mutant("strict causality", {"sees": operator.lt}),
        Mutant("one block", {"topk": 1}),
        Mutant("the selection of the next query", {"chosen": rolled}),
    ),
    spell(
        chunk_of_gathers,
        Kind.S2,
        Mutant("one position back", {"start": START - 1}),
        Mutant("scale doubled", {"scale": 2 * SCALE}),
        Mutant("values of the next key", {"values": rolled}),
    ),
    replace(
        spell(
            loop_over_chunks,
            Kind.WINDOW,
            Mutant("window 15", {"window": 15}),
            Mutant("one position late", {"late": 1}, must_refuse=True),
            Mutant("values in reverse order", {"order": flipped}),
        ),
        roles=("sliding_window",) * (LENGTH // CHUNK),
    ),
)
