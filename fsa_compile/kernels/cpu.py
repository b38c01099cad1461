"""Attention over a band of keys, blocked: the CPU path of the compressed and the sliding-window op.

Query i sees the keys ``start[i] <= p < stop[i]``, and both ends grow with i. The algorithm:

1. Cut the queries into chunks; a chunk needs the keys from its smallest start to its largest stop, a slice without a copy.
2. One batched matmul gives the chunk's logits, all query heads of a key head as rows of one matrix.
3. Columns that some query of the chunk does not see get -inf added; softmax with the row's own maximum; second matmul.
4. Backward recomputes the weights from the saved log-sum-exp and adds to slices of dK and dV in place.

No buffer exceeds `SCRATCH_ELEMENTS`, whatever n and m are (one query and all its keys being the smallest unit). Nothing here
is specific to a CPU: other devices run it where they have no kernel of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fsa_compile.kernels.reference import compute_dtype, query_positions

SCRATCH_ELEMENTS = 1 << 19
"""Elements of one logits buffer: 2 MiB in float32, which stays in cache (8 MiB took 1.3 times as long on a Zen 5 core)."""

CHUNK = 256
"""Most queries per chunk: a longer chunk wastes more of a window's matmul."""


@dataclass(frozen=True)
class Band:
    """Which keys each query sees: ``start <= p < stop``, both (b or 1, n) int64 on the CPU, nondecreasing in n.

    On the CPU, so that the slices of a chunk are known without waiting for a device.
    """

    start: Tensor
    stop: Tensor


def sliding_window_band(n: int, m: int, window: int, q_offset: int, q_offsets: Tensor | None) -> Band:
    """The band of the last `window` keys up to the query's position."""
    positions = query_positions(n, q_offset, q_offsets, torch.device("cpu"))
    return Band((positions - window + 1).clamp(0, m), (positions + 1).clamp(0, m))


def compressed_band(n: int, c: int, stride: int, last: int, prefix: int, q_offset: int, q_offsets: Tensor | None) -> Band:
    """The band of the compressed keys that end at or before the query's position, and of the prefix."""
    positions = query_positions(n, q_offset, q_offsets, torch.device("cpu"))
    whole = (positions - last).div(stride, rounding_mode="floor") + 1
    return Band(torch.zeros_like(positions), (whole.clamp(min=0) + prefix).clamp(max=c))


@dataclass(frozen=True)
class Chunk:
    """Some queries of some batch rows with the keys that they need.

    Args:
        batch: Batch rows.
        queries: Queries.
        keys: Keys that at least one of the queries sees (a hull, so some may not).
        masked: First column of `keys` that is not seen by all of them.
        bias: 0 where seen, -inf elsewhere, for the columns from `masked` on: (batch or 1, 1, 1, queries, columns), or None.
    """

    batch: slice
    queries: slice
    keys: slice
    masked: int
    bias: Tensor | None


def chunks(band: Band, batch: int, heads: int, device: torch.device, dtype: torch.dtype) -> Iterator[Chunk]:
    """Cuts the work into pieces whose logits fit the scratch; pieces without a visible key are left out."""
    n = band.start.shape[1]
    widest = int((band.stop - band.start).max())
    per_query = max(1, heads * (widest + CHUNK))
    length = max(1, min(n, CHUNK, SCRATCH_ELEMENTS // per_query))
    rows = max(1, min(batch, SCRATCH_ELEMENTS // (per_query * length)))
    last_key, last_bias = None, None
    for b in range(0, batch, rows):
        own = slice(b, b + rows) if band.start.shape[0] > 1 else slice(0, 1)
        for i in range(0, n, length):
            start, stop = band.start[own, i : i + length], band.stop[own, i : i + length]
            some = start < stop
            if not some.any():
                continue
            lo, hi = int(start[some].min()), int(stop.max())
            masked = max(lo, int(stop.min())) if int(start.max()) <= lo else lo
            bias = None
            if masked < hi:
                # Neighbouring chunks of a window have one mask: build it once.
                key = (start - masked, stop - masked, hi - masked)
                if last_key is None or key[2] != last_key[2] or not all(torch.equal(x, y) for x, y in zip(key[:2], last_key[:2])):
                    columns = torch.arange(hi - masked)
                    seen = (columns >= key[0][..., None]) & (columns < key[1][..., None])
                    last_bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).to(device)[:, None, None]
                    last_key = key
                bias = last_bias
            yield Chunk(slice(b, min(b + rows, batch)), slice(i, min(i + length, n)), slice(lo, hi), masked - lo, bias)


def _rows(x: Tensor, chunk: Chunk, groups: int, dtype: torch.dtype) -> Tensor:
    """The chunk's rows of a query-side tensor (b, hq, n, d), all heads of a key head together: (batch * hkv, g * queries, d)."""
    part = x[chunk.batch, :, chunk.queries].to(dtype)
    return part.reshape(part.shape[0] * groups, -1, part.shape[-1])


def _columns(x: Tensor, chunk: Chunk) -> Tensor:
    """The chunk's rows of a key-side tensor (b, hkv, m, d), a view: (batch * hkv, keys, d)."""
    return x[chunk.batch].flatten(0, 1)[:, chunk.keys]


def _logits(q: Tensor, k: Tensor, chunk: Chunk, groups: int) -> Tensor:
    """Masked logits (batch * hkv, g * queries, keys) of the chunk's scaled queries."""
    logits = torch.bmm(q, k.transpose(1, 2))
    if chunk.bias is not None:
        rows = chunk.queries.stop - chunk.queries.start
        logits.view(-1, groups, q.shape[1] // rows, rows, k.shape[1])[..., chunk.masked :].add_(chunk.bias)
    return logits


def banded_attention_forward(q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query over its band.

    Args:
        q: Queries (b, hq, n, dk), any strides and floating dtype.
        k: Keys (b, hkv, m, dk).
        v: Values (b, hkv, m, dv).
        band: Visible keys.
        scale: Multiplies the logits.

    Returns:
        out (b, hq, n, dv) in q's dtype, lse (b, hq, n) in `compute_dtype`, both contiguous.
    """
    dtype = compute_dtype(q, k, v)
    b, hq, n, _ = q.shape
    groups = k.shape[1]
    out = q.new_zeros(b, hq, n, v.shape[-1])
    lse = q.new_full((b, hq, n), -torch.inf, dtype=dtype)
    if out.numel() == 0 or k.shape[2] == 0:
        return out, lse
    k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
    for chunk in chunks(band, b, hq, q.device, dtype):
        logits = _logits(_rows(q, chunk, groups, dtype) * scale, _columns(k, chunk), chunk, groups)
        peak = logits.amax(-1, keepdim=True)
        # A row of -inf would give -inf - -inf = NaN: measured from a finite number its weights are exp(-inf) = 0.
        weights = exp_(logits.sub_(peak.clamp(min=torch.finfo(dtype).min)))
        total = weights.sum(-1, keepdim=True)
        part = torch.bmm(weights, _columns(v, chunk)).div_(total.masked_fill(total == 0, 1.0))
        target = out[chunk.batch, :, chunk.queries]
        target.copy_(part.view(target.shape))
        target = lse[chunk.batch, :, chunk.queries]
        target.copy_((peak + total.log()).view(target.shape))
    return out, lse


def banded_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `banded_attention_forward`.

    Args:
        dout: Gradient of out, (b, hq, n, dv).
        dlse: Gradient of lse, (b, hq, n), or None for zero.
        q, k, v, out, lse, band, scale: As given to and returned by the forward.

    Returns:
        dq, dk, dv, contiguous, shaped and typed like q, k and v.
    """
    dtype = compute_dtype(q, k, v)
    groups = k.shape[1]
    dq = q.new_zeros(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
    if out.numel() and k.shape[2]:
        keys, values = k.to(dtype).contiguous(), v.to(dtype).contiguous()
        # exp(x - inf) = 0: an empty row has no weight anywhere.
        reference = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
        for chunk in chunks(band, *q.shape[:2], q.device, dtype):
            rows = _rows(q, chunk, groups, dtype) * scale
            grad = _rows(dout, chunk, groups, dtype)
            weights = _logits(rows, _columns(keys, chunk), chunk, groups)
            weights = exp_(weights.sub_(_rows(reference, chunk, groups, dtype)))
            _columns(dv, chunk).baddbmm_(weights.transpose(1, 2), grad)
            slope = torch.bmm(grad, _columns(values, chunk).transpose(1, 2))
            # The chunk holds all that its rows see, so rowsum(weights * slope) is rowsum(dout * out) before out was rounded: with
            # the rounded one every key of a row is off in the same direction, and what sums dk over keys sees it.
            slope.mul_(weights)
            shift = slope.sum(-1, keepdim=True)
            if dlse is not None:
                shift -= _rows(dlse[..., None], chunk, groups, dtype)
            slope.addcmul_(weights, shift, value=-1)
            _columns(dk, chunk).baddbmm_(slope.transpose(1, 2), rows)
            target = dq[chunk.batch, :, chunk.queries]
            target.copy_(torch.bmm(slope, _columns(keys, chunk)).mul_(scale).view(target.shape))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def exp_(x: Tensor) -> Tensor:
    """exp in place, by exp2.

    On a CPU exp2 is 4 times as fast as exp, and up to 100 times where many arguments are -inf or underflow, which is what masks
    and sharp softmaxes give (measured: float32, AVX-512, MKL). Logits in base 2 would save the multiplication, but a
    log-sum-exp converted there and back costs backward a digit where logits are large.
    """
    return x.mul_(math.log2(math.e)).exp2_()


def row_shift(dout: Tensor, dlse: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:
    """rowsum(dout * out) - dlse, (b, hq, n, 1): what every logit gradient of a row subtracts before its weight multiplies."""
    shift = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    return shift if dlse is None else shift - dlse.to(dtype)[..., None]
