"""Selected attention, blocked, keys outermost: the CPU path, and that of other devices without a kernel of their own.

1. Take a pass: some batch rows, heads and queries, so that the scratch stays bounded whatever the lists are.
2. Sort its (block, query) pairs into tiles of queries that list the same block (`cpu_plan`): a block's keys are then read once
   per tile and not once per query, and every tile is one matrix product.
3. Forward: each tile gives unnormalised partial outputs with their own maximum and sum per row. The partials of a
   query are merged with weights exp(max - overall max) / sum, a gather and weighted sum in one call (`embedding_bag`).
4. Backward recomputes the weights from the saved log-sum-exp: no merge for dK and dV (added up per block), a plain sum of the
   partial dQ of a query.

No atomics and no order that depends on threads: two runs on a CPU are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from fsa_compile.kernels.cpu import exp_, row_shift
from fsa_compile.kernels.cpu_plan import plan_tiles, visible_keys
from fsa_compile.kernels.reference import compute_dtype, query_positions

PARTIAL_ELEMENTS = 1 << 22
"""Elements of the partial outputs of a pass: 16 MiB in float32 (32 MiB took 1.1 times as long on a Zen 5 core)."""

TILE_ELEMENTS = 1 << 18
"""Elements of the logits of the tiles worked on together: 1 MiB in float32 (4 MiB took 1.2 times as long on a Zen 5 core)."""

MATRIX_ROWS = 128
"""Rows of a tile's matrices, query heads of the group included: larger ones fill the matmul, smaller ones waste less."""


@dataclass(frozen=True)
class Problem:
    """Shapes and constants of one call.

    Args:
        batch: Batch rows.
        kv_heads: Key/value heads.
        heads: Index heads hi, a multiple of `kv_heads`.
        group: Query heads per index head.
        n: Queries.
        m: Keys.
        block_size: Keys per block.
        rule: "causal", "listed" or "diagonal".
        positions: Query positions (batch or 1, n).
        dtype: Of logits, statistics and accumulators.
    """

    batch: int
    kv_heads: int
    heads: int
    group: int
    n: int
    m: int
    block_size: int
    rule: str
    positions: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, rule: str, q_offset: int, q_offsets: Tensor | None
    ) -> Problem:
        """The problem that these arguments of the op pose."""
        (b, hq, n, _), heads = q.shape, indices.shape[1]
        positions = query_positions(n, q_offset, q_offsets, q.device)
        return cls(b, k.shape[1], heads, hq // heads, n, k.shape[2], block_size, rule, positions, compute_dtype(q, k, v))

    @property
    def blocks(self) -> int:
        """Number of blocks of keys."""
        return -(-self.m // self.block_size)

    def block_table(self, x: Tensor) -> Tensor:
        """Keys or values (b, hkv, m, d) with one block per row: (b * hkv * blocks, block_size * d), zeros past the end."""
        x = pad(x.to(self.dtype), (0, 0, 0, self.blocks * self.block_size - self.m))
        return x.reshape(-1, self.block_size * x.shape[-1])

    def from_block_table(self, table: Tensor, like: Tensor) -> Tensor:
        """The inverse of `block_table`, shaped and typed like `like`, contiguous."""
        x = table.view(self.batch, self.kv_heads, -1, like.shape[-1])[:, :, : self.m]
        return x.to(like.dtype, memory_format=torch.contiguous_format, copy=not x.is_contiguous())


@dataclass(frozen=True)
class Pass:
    """A piece of a problem: slices of the batch, of the index heads and of the queries."""

    batch: slice
    heads: slice
    queries: slice

    def of_queries(self, x: Tensor, group: int) -> Tensor:
        """The pass's part of a query-side tensor (b, hq, n, d), a view: (batch, heads, queries, group, d)."""
        return x.unflatten(1, (-1, group))[self.batch, self.heads, :, self.queries].transpose(2, 3)

    def table(self, x: Tensor, group: int, dtype: torch.dtype, unused: float = 0.0) -> Tensor:
        """`of_queries` as a table of rows to gather from, and one row more for the unused places of tiles.

        Returns:
            (batch * heads * queries + 1, group * d).
        """
        part = self.of_queries(x, group)
        table = part.new_empty(part.shape[:3].numel() + 1, part.shape[3:].numel(), dtype=dtype)
        table[:-1].view(part.shape).copy_(part)
        table[-1] = unused
        return table


def passes(problem: Problem, t: int, width: int) -> Iterator[Pass]:
    """Cuts a problem into pieces with at most `PARTIAL_ELEMENTS` partials, `width` elements per query head and entry."""
    entries = PARTIAL_ELEMENTS // (width * problem.group * t)
    queries = max(1, min(problem.n, entries))
    heads = max(1, min(problem.heads, entries // queries))
    batch = max(1, min(problem.batch, entries // (queries * heads)))
    for b in range(0, problem.batch, batch):
        for h in range(0, problem.heads, heads):
            for i in range(0, problem.n, queries):
                yield Pass(slice(b, b + batch), slice(h, h + heads), slice(i, i + queries))


def reads_freely(device: torch.device) -> bool:
    """Whether the host reads this device's tensors without waiting for it."""
    return device.type == "cpu"


class Tiles:
    """The tiles of one pass, and where their keys, queries and partial results lie.

    Args:
        problem: What is computed.
        piece: Which part of it.
        indices: Block lists (b, hi, n, t) of the whole problem.
    """

    def __init__(self, problem: Problem, piece: Pass, indices: Tensor) -> None:
        listed = indices[piece.batch, piece.heads, piece.queries]
        batch, heads, n, t = listed.shape
        positions = problem.positions.expand(problem.batch, -1)[piece.batch, None, piece.queries]
        positions = positions.expand(-1, heads, -1).flatten(0, 1)
        average = n * t // problem.blocks
        self.problem = problem
        self.rows = max(1, min(MATRIX_ROWS // problem.group, 1 << average.bit_length() >> 1))
        self.plan = plan_tiles(
            listed.flatten(0, 1),
            positions,
            problem.block_size,
            problem.m,
            problem.rule,
            self.rows,
            exact=reads_freely(indices.device),
        )
        self.positions = pad(positions.flatten(), (0, 1))
        head = self.plan.head % heads + piece.heads.start
        row = self.plan.head.div(heads, rounding_mode="floor") + piece.batch.start
        kv_head = head.div(problem.heads // problem.kv_heads, rounding_mode="floor")
        self.kv_block = (row * problem.kv_heads + kv_head) * problem.blocks + self.plan.block

    def slices(self, *widths: int) -> Iterator[slice]:
        """Runs of tiles whose largest buffer, of rows x keys or of either x a head dimension of `widths`, fits the cache."""
        tall = max(self.rows * self.problem.group, self.problem.block_size)
        step = max(1, TILE_ELEMENTS // (tall * max(self.problem.block_size, *widths)))
        for first in range(0, len(self.kv_block), step):
            yield slice(first, min(first + step, len(self.kv_block)))

    def queries(self, table: Tensor, run: slice) -> Tensor:
        """Rows of a `Pass.table`: (tiles, rows * group, d)."""
        rows = table.index_select(0, self.plan.row[run].flatten())
        return rows.view(run.stop - run.start, self.rows * self.problem.group, -1)

    def keys(self, table: Tensor, run: slice) -> Tensor:
        """Rows of a `Problem.block_table`: (tiles, block_size, d)."""
        return table.index_select(0, self.kv_block[run]).view(run.stop - run.start, self.problem.block_size, -1)

    def logits(self, q: Tensor, k: Tensor, run: slice) -> Tensor:
        """Masked logits (tiles, rows * group, block_size) of scaled queries. Every row, used or not, keeps one finite logit."""
        logits = torch.bmm(q, k.transpose(1, 2))
        first = max(run.start, self.plan.masked)
        if first < run.stop:
            size, some = self.problem.block_size, slice(first, run.stop)
            positions = self.positions[self.plan.row[some]]
            seen = visible_keys(positions, self.plan.block[some, None], size, self.problem.m, self.problem.rule).clamp(min=1)
            # Row c of the table hides all keys but the first c; adding it is much faster than masked_fill on a CPU.
            bias = logits.new_full((size + 1, size), -torch.inf).triu_()
            bias = bias.index_select(0, seen.flatten()).view(len(seen), self.rows, 1, size)
            logits[first - run.start :].view(len(seen), self.rows, -1, size).add_(bias)
        return logits

    def partials(self, width: int, unused: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """A buffer of partials (tiles * rows + 1, group, width), and its part that tiles write, (tiles, rows * group, width).

        The buffer's last row, filled with `unused`, belongs to the entries that count nothing.
        """
        buffer = like.new_empty(self.plan.row.numel() + 1, self.problem.group, width, dtype=self.problem.dtype)
        buffer[-1] = unused
        return buffer, buffer[:-1].view(len(self.kv_block), self.rows * self.problem.group, width)

    def merge(self, partials: Tensor, weights: Tensor | None = None) -> Tensor:
        """Adds up the partials of each query, multiplied by `weights` (heads * n * group, t): (heads * n * group, width)."""
        group = self.problem.group
        places = self.plan.place.flatten(0, 1)[:, None] * group + torch.arange(group, device=partials.device)[:, None]
        return embedding_bag(places.flatten(0, 1), partials.flatten(0, 1), mode="sum", per_sample_weights=weights)


def selected_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    rule: str,
    q_offset: int,
    q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the blocks it lists; the meaning is `reference.selected_attention`.

    Args:
        q: Queries (b, hq, n, dk), any strides and floating dtype.
        k: Keys (b, hkv, m, dk).
        v: Values (b, hkv, m, dv).
        indices: Block numbers (b, hi, n, t), any integer dtype; hkv divides hi and hi divides hq.
        block_size: Keys per block.
        scale: Multiplies the logits.
        rule: "causal", "listed" or "diagonal".
        q_offset: Position of query 0; ignored if `q_offsets` is given.
        q_offsets: Position of query 0 per batch row, (b,), or None.

    Returns:
        out (b, hq, n, dv) in q's dtype, lse (b, hq, n) in `compute_dtype`, both contiguous.
    """
    problem = Problem.of(q, k, v, indices, block_size, rule, q_offset, q_offsets)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=problem.dtype)
    t, group = indices.shape[-1], problem.group
    if 0 in (q.shape[:3].numel(), problem.m, t):
        return out, lse
    key_table, value_table = problem.block_table(k), problem.block_table(v)
    for piece in passes(problem, t, v.shape[-1]):
        tiles = Tiles(problem, piece, indices)
        queries = piece.table(q, group, problem.dtype).mul_(scale)
        partial, partial_tiles = tiles.partials(v.shape[-1], 0.0, q)
        peak, peak_tiles = tiles.partials(1, -torch.inf, q)
        total, total_tiles = tiles.partials(1, 0.0, q)
        for run in tiles.slices(q.shape[-1], v.shape[-1]):
            logits = tiles.logits(tiles.queries(queries, run), tiles.keys(key_table, run), run)
            torch.amax(logits, -1, keepdim=True, out=peak_tiles[run])
            weights = exp_(logits.sub_(peak_tiles[run]))
            torch.sum(weights, -1, keepdim=True, out=total_tiles[run])
            torch.bmm(weights, tiles.keys(value_table, run), out=partial_tiles[run])
        peaks, totals = (x[tiles.plan.place.flatten(0, 1)].squeeze(-1).transpose(1, 2) for x in (peak, total))
        top = peaks.amax(-1, keepdim=True)
        # A query without an entry has top = -inf; measured from a finite number its weights are exp(-inf) = 0.
        weights = (peaks - top.clamp(min=torch.finfo(problem.dtype).min)).exp()
        row_total = (weights * totals).sum(-1, keepdim=True)
        weights = weights / row_total.masked_fill(row_total == 0, 1.0)
        target = piece.of_queries(out, group)
        target.copy_(tiles.merge(partial, weights.flatten(0, 1)).view(target.shape))
        target = piece.of_queries(lse[..., None], group)
        target.copy_((top + row_total.log()).view(target.shape))
    return out, lse


def selected_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    block_size: int,
    scale: float,
    rule: str,
    q_offset: int,
    q_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `selected_attention_forward`.

    Args:
        dout: Gradient of out, (b, hq, n, dv).
        dlse: Gradient of lse, (b, hq, n), or None for zero.
        q, k, v, out, lse, indices, block_size, scale, rule, q_offset, q_offsets: As given to and returned by the forward.

    Returns:
        dq, dk, dv, contiguous, shaped and typed like q, k and v.
    """
    problem = Problem.of(q, k, v, indices, block_size, rule, q_offset, q_offsets)
    t, group, dtype = indices.shape[-1], problem.group, problem.dtype
    if 0 in (q.shape[:3].numel(), problem.m, t):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq = q.new_empty(q.shape)
    key_table, value_table = problem.block_table(k), problem.block_table(v)
    key_grads, value_grads = torch.zeros_like(key_table), torch.zeros_like(value_table)
    shift = row_shift(dout, dlse, out, dtype)
    # exp(x - inf) = 0: an empty row has no weight anywhere.
    reference = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    for piece in passes(problem, t, q.shape[-1]):
        tiles = Tiles(problem, piece, indices)
        queries = piece.table(q, group, dtype).mul_(scale)
        grads = piece.table(dout, group, dtype)
        references = piece.table(reference, group, dtype, unused=torch.inf)
        shifts = piece.table(shift, group, dtype)
        partial, partial_tiles = tiles.partials(q.shape[-1], 0.0, q)
        for run in tiles.slices(q.shape[-1], v.shape[-1]):
            rows, grad = tiles.queries(queries, run), tiles.queries(grads, run)
            keys, values = tiles.keys(key_table, run), tiles.keys(value_table, run)
            weights = exp_(tiles.logits(rows, keys, run).sub_(tiles.queries(references, run)))
            value_grads.index_add_(0, tiles.kv_block[run], torch.bmm(weights.transpose(1, 2), grad).flatten(1))
            slope = torch.bmm(grad, values.transpose(1, 2)).sub_(tiles.queries(shifts, run)).mul_(weights)
            key_grads.index_add_(0, tiles.kv_block[run], torch.bmm(slope.transpose(1, 2), rows).flatten(1))
            torch.bmm(slope, keys, out=partial_tiles[run])
        target = piece.of_queries(dq, group)
        target.copy_(tiles.merge(partial).mul_(scale).view(target.shape))
    return dq, problem.from_block_table(key_grads, k), problem.from_block_table(value_grads, v)
