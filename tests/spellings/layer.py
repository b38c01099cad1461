"""A whole layer: three branches over one projection, importance from the compressed probabilities, sigmoid gates."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spelling import (
    BATCH,
    BLOCK,
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    LENGTH,
    SCALE,
    TOP_K,
    Kind,
    Mutant,
    Spelling,
    from_module,
    interleave,
    tile,
)

Comparison = Callable[[Tensor, Tensor], Tensor]

WIDTH = 32
WINDOW = 16
INPUT = ((BATCH, LENGTH, WIDTH),)


class ThreeBranches(nn.Module):
    """Compressed (memory token in front), selected (dense mask) and window (band) attention, summed by sigmoid gates.

    Args:
        ahead: The compressed branch sees block j from position (j + ahead) * B on.
        window: Width of the band.
        heads: How key and value heads are repeated.
        scale: Of all three branches.
        sees: Causal comparison of the window branch, (i, j).
        axis: Softmax axis of the selected branch.
    """

    def __init__(
        self,
        *,
        ahead: int = 1,
        window: int = WINDOW,
        heads: Callable[[Tensor, int], Tensor] = interleave,
        scale: float = SCALE,
        sees: Comparison = operator.ge,
        axis: int = -1,
    ) -> None:
        super().__init__()
        self.ahead, self.window, self.heads, self.scale, self.sees, self.axis = ahead, window, heads, scale, sees, axis
        self.to_q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * KV_HEADS * DIM, bias=False)
        self.to_gates = nn.Linear(WIDTH, 3 * HEADS)
        self.to_out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.compress_key = nn.Linear(BLOCK * DIM, DIM)
        self.compress_value = nn.Linear(BLOCK * DIM, DIM)
        self.memory = nn.Parameter(torch.zeros(2, KV_HEADS, 1, DIM))

    def compressed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (b, hq, n, d) and importance (b, hkv, n, blocks)."""
        b, hkv, n, _ = k.shape
        small_k = self.compress_key(k.unflatten(2, (-1, BLOCK)).flatten(3))
        small_v = self.compress_value(v.unflatten(2, (-1, BLOCK)).flatten(3))
        small_k = torch.cat((self.memory[0].expand(b, -1, -1, -1), small_k), dim=2)
        small_v = torch.cat((self.memory[1].expand(b, -1, -1, -1), small_v), dim=2)
        start = (torch.arange(n // BLOCK) + self.ahead) * BLOCK
        visible = F.pad(torch.arange(n)[:, None] >= start, (1, 0), value=True)
        logits = q @ self.heads(small_k, GROUP).transpose(-1, -2) * self.scale
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        return weights @ self.heads(small_v, GROUP), weights[..., 1:].unflatten(1, (hkv, GROUP)).sum(2)

    def selected(self, q: Tensor, k: Tensor, v: Tensor, importance: Tensor) -> Tensor:
        """Top blocks by importance, the own block forced: (b, hq, n, d)."""
        n = k.shape[2]
        own = torch.arange(n)[:, None] // BLOCK == torch.arange(n // BLOCK)
        indices = importance.masked_fill(own, float("inf")).topk(TOP_K, dim=-1).indices
        chosen = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, indices, True)
        visible = chosen.repeat_interleave(BLOCK, dim=-1) & torch.ones(n, n, dtype=torch.bool).tril()
        logits = q @ self.heads(k, GROUP).transpose(-1, -2) * self.scale
        weights = logits.masked_fill(~visible.repeat_interleave(GROUP, dim=1), -1e9).softmax(self.axis)
        return weights @ self.heads(v, GROUP)

    def sliding(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last `window` keys: (b, hq, n, d)."""
        i, j = torch.arange(k.shape[2])[:, None], torch.arange(k.shape[2])
        mask = self.sees(i, j) & (i - j < self.window)
        return F.scaled_dot_product_attention(q, self.heads(k, GROUP), self.heads(v, GROUP), attn_mask=mask, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) to (b, n, width)."""
        q = self.to_q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(-1, (2, KV_HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out, importance = self.compressed(q, k, v)
        branches = torch.stack((out, self.selected(q, k, v, importance), self.sliding(q, k, v)))
        gates = self.to_gates(x).sigmoid().unflatten(-1, (3, HEADS, 1)).permute(2, 0, 3, 1, 4)
        return self.to_out((branches * gates).sum(0).transpose(1, 2).flatten(2))


SPELLINGS = (
    Spelling(
        "three_branches",
        Kind.LAYER,
        from_module(ThreeBranches, INPUT),
        ("compressed", "selected", "sliding_window"),
        (
            Mutant("the own block leaks", {"ahead": 0}),
            Mutant("window 15", {"window": WINDOW - 1}),
            Mutant("heads tiled", {"heads": tile}),
            Mutant("scale doubled", {"scale": 2 * SCALE}),
            Mutant("window sees the future", {"sees": operator.ne}, must_refuse=True),
            Mutant("selected softmax over queries", {"axis": -2}, must_refuse=True),
        ),
    ),
)
