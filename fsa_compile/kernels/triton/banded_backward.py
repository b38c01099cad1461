"""Backward of banded attention in three kernels, none of which uses atomics: two runs agree bit for bit.

    delta = rowsum(dO * O) - dLSE                                         `row_delta` of `selected_backward`
    for each tile of keys (and part of the queries that see it):          _banded_dkv_kernel, one program each
        for each tile of (query, head) rows from the first to the last query that sees a key of the tile:
            p^T  = exp2(k q^T * scale * log2(e) - lse * log2(e)), masked
            dV += p^T dO;  ds^T = p^T * (v dO^T - delta);  dK += ds^T q
    for each tile of (query, head) rows:                                  _banded_dq_kernel, one program each
        for each tile of keys, as in forward:  dQ += ds k

The rows of a key tile run over the whole group, so dK and dV of a group add up in float32. Where there are few tiles of keys
(compressed attention), the queries of a tile are cut into parts that write float32 partials, summed afterwards.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 2; the transposed products keep P and dS in registers. dLSE enters as
d logit = p * (dP - rowsum(dO * O) + dLSE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .banded_launch import dkv_launch, dq_launch, query_splits
from .bands import BAND_ARGUMENTS, BandRule, band_start, band_stop, load_rows, query_shift, seen_from, seen_until
from .items import tile_mask
from .launch import device_of, power_of_two
from .selected_backward import row_delta
from .selected_forward import LOG2E


@triton.jit
def _load_statistics(lse, delta, at, live, log2e):
    """lse in base 2 and delta of some rows. A row without keys has neither: 0, for its weights are masked."""
    lse_i = tl.load(lse + at, mask=live, other=float("-inf"))
    empty = lse_i == float("-inf")
    delta_i = tl.load(delta + at, mask=live, other=0.0)
    return tl.where(empty, 0.0, lse_i * log2e), tl.where(empty, 0.0, delta_i)


@triton.jit(do_not_specialize=[*BAND_ARGUMENTS, "parts"])
def _banded_dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, offsets, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, do_stride_b, do_stride_h, do_stride_n,
    n_queries, n_keys, window, stride, last, prefix, offset, parts, scale, log2_scale, log2e, hkv, group,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // HEADS
    lines = tl.num_programs(0) // (tl.cdiv(n_keys, KEYS) * parts)
    part = tl.program_id(0) % parts
    line = (tl.program_id(0) // parts) % lines
    tile = tl.program_id(0) // (parts * lines)
    batch = (line // hkv).to(tl.int64)
    kv_head = (line % hkv).to(tl.int64)
    shift = query_shift(offsets, batch, offset, HAS_OFFSETS)

    key = tile * KEYS + tl.arange(0, KEYS)
    there = key < n_keys
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    k_tile = load_rows(k + batch * k_stride_b + kv_head * k_stride_h, key, k_stride_n, c, there, DK, DK_PAD, True)
    v_tile = load_rows(v + batch * v_stride_b + kv_head * v_stride_h, key, v_stride_n, e, there, DV, DV_PAD, True)
    from_query = seen_from(key, shift, stride, last, prefix, n_queries)
    until_query = seen_until(key, shift, window, n_queries, WINDOW)
    front = seen_from(tile * KEYS, shift, stride, last, prefix, n_queries)
    back = seen_until(tl.minimum(tile * KEYS + KEYS, n_keys) - 1, shift, window, n_queries, WINDOW)
    share = tl.cdiv(tl.cdiv(tl.maximum(back - front, 0), parts), QUERIES) * QUERIES
    begin = front + part * share
    end = tl.minimum(begin + share, back)

    row = tl.arange(0, ROWS)
    dk_acc = tl.zeros((KEYS, DK_PAD), tl.float32)
    dv_acc = tl.zeros((KEYS, DV_PAD), tl.float32)
    for piece in range(0, group // HEADS):
        head = kv_head * group + piece * HEADS + row % HEADS
        q_head = q + batch * q_stride_b + head * q_stride_h
        do_head = dout + batch * do_stride_b + head * do_stride_h
        statistics = (batch * hkv * group + head) * n_queries
        for first in range(begin, end, QUERIES):
            query = first + row // HEADS
            live = query < n_queries
            wide = query.to(tl.int64)
            q_at = (q_head + wide * q_stride_n)[:, None] + c[None, :]
            q_tile = tl.load(q_at, mask=tile_mask(live, c, DK, DK_PAD), other=0.0)
            lse_i, delta_i = _load_statistics(lse, delta, statistics + wide, live, log2e)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * log2_scale
            seen = query[None, :] >= from_query[:, None]
            if WINDOW:
                seen = seen & (query[None, :] < until_query[:, None])
            p = tl.exp2(tl.where(seen, s - lse_i[None, :], float("-inf")))
            do_at = (do_head + wide * do_stride_n)[:, None] + e[None, :]
            do_tile = tl.load(do_at, mask=tile_mask(live, e, DV, DV_PAD), other=0.0)
            dv_acc += tl.dot(p.to(do_tile.dtype), do_tile, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            ds = (p * (dp - delta_i[None, :])).to(q_tile.dtype)
            dk_acc += tl.dot(ds, q_tile, input_precision="ieee")
    # dk and dv are (parts, b, hkv, m, d)
    target = (part.to(tl.int64) * lines + line) * n_keys + key
    dk_at = dk + target[:, None] * DK + c[None, :]
    dv_at = dv + target[:, None] * DV + e[None, :]
    tl.store(dk_at, (dk_acc * scale).to(dk.dtype.element_ty), mask=tile_mask(there, c, DK, DK_PAD))
    tl.store(dv_at, dv_acc.to(dv.dtype.element_ty), mask=tile_mask(there, e, DV, DV_PAD))


@triton.jit
def _descend(
    acc, q_tile, do_tile, lse_i, delta_i, k_base, v_base, k_stride_n, v_stride_n, begin, end, start, stop, log2_scale,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds ds k of the keys begin ... end - 1 to `acc`; unless MASKED, whole tiles that every row sees."""
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        k_tile = load_rows(k_base, key, k_stride_n, c, key < end, DK, DK_PAD, MASKED)
        v_tile = load_rows(v_base, key, v_stride_n, e, key < end, DV, DV_PAD, MASKED)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale - lse_i[:, None]
        if MASKED:
            seen = key[None, :] < stop[:, None]
            if WINDOW:
                seen = seen & (key[None, :] >= start[:, None])
            s = tl.where(seen, s, float("-inf"))
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = (tl.exp2(s) * (dp - delta_i[:, None])).to(k_tile.dtype)
        acc += tl.dot(ds, k_tile, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=list(BAND_ARGUMENTS))
def _banded_dq_kernel(
    q, k, v, dout, lse, delta, dq, offsets, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, do_stride_b, do_stride_h, do_stride_n,
    n_queries, n_keys, window, stride, last, prefix, offset, scale, log2_scale, log2e, hq, group,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // HEADS
    tiles = tl.cdiv(n_queries, QUERIES)
    lines = tl.num_programs(0) // tiles
    tile = tiles - 1 - tl.program_id(0) // lines
    line = tl.program_id(0) % lines
    batch = (line // (hq // HEADS)).to(tl.int64)
    first_head = (line % (hq // HEADS)) * HEADS
    kv_head = (first_head // group).to(tl.int64)
    shift = query_shift(offsets, batch, offset, HAS_OFFSETS)

    row = tl.arange(0, ROWS)
    query = tile * QUERIES + row // HEADS
    head = (first_head + row % HEADS).to(tl.int64)
    live = query < n_queries
    wide = query.to(tl.int64)
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    q_row = batch * q_stride_b + head * q_stride_h + wide * q_stride_n
    do_row = batch * do_stride_b + head * do_stride_h + wide * do_stride_n
    target = (batch * hq + head) * n_queries + query
    q_tile = tl.load(q + q_row[:, None] + c[None, :], mask=tile_mask(live, c, DK, DK_PAD), other=0.0)
    do_tile = tl.load(dout + do_row[:, None] + e[None, :], mask=tile_mask(live, e, DV, DV_PAD), other=0.0)
    lse_i, delta_i = _load_statistics(lse, delta, target, live, log2e)
    k_base = k + batch * k_stride_b + kv_head * k_stride_h
    v_base = v + batch * v_stride_b + kv_head * v_stride_h

    start = band_start(query + shift, window, WINDOW)
    stop = band_stop(query + shift, stride, last, prefix, n_keys)
    front = tile * QUERIES + shift
    back = tl.minimum(tile * QUERIES + QUERIES, n_queries) - 1 + shift
    begin = band_start(front, window, WINDOW)
    end = band_stop(back, stride, last, prefix, n_keys)
    acc = tl.zeros((ROWS, DK_PAD), tl.float32)
    if not WINDOW:
        whole = tl.maximum(band_stop(front, stride, last, prefix, n_keys), 0) // KEYS * KEYS
        acc = _descend(
            acc, q_tile, do_tile, lse_i, delta_i, k_base, v_base, k_stride_n, v_stride_n, begin, whole, start, stop, log2_scale,
            DK, DV, DK_PAD, DV_PAD, KEYS, WINDOW, False,
        )  # fmt: skip
        begin = whole
    acc = _descend(
        acc, q_tile, do_tile, lse_i, delta_i, k_base, v_base, k_stride_n, v_stride_n, begin, end, start, stop, log2_scale,
        DK, DV, DK_PAD, DV_PAD, KEYS, WINDOW, True,
    )  # fmt: skip
    acc = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + target[:, None] * DK + c[None, :], acc, mask=tile_mask(live, c, DK, DK_PAD))


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    rule: BandRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv; see `banded_attention_backward`."""
    if 0 in (*q.shape[:3], k.shape[2]):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    delta = row_delta(dout, out, dlse)
    dk, dv = launch_dkv(dout, q, k, v, lse, delta, scale, rule)
    return launch_dq(dout, q, k, v, lse, delta, scale, rule), dk, dv


def launch_dkv(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    rule: BandRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk (b, hkv, m, dk) and dv (b, hkv, m, dv), contiguous, of the inputs' dtype."""
    (b, hq, n, d), (_, hkv, m, e) = q.shape, v.shape
    # A key is seen by as many queries as a query sees keys in a window, by up to all of them without.
    seen_by = n if rule.window is None else min(n, max(rule.window, 1))
    launch = dkv_launch(hq // hkv, d, e, q.dtype, device_of(q), seen_by)
    programs = -(-m // launch.keys) * b * hkv
    parts = query_splits(programs, -(-seen_by // launch.queries), b * hkv * m * (d + e) * 4)
    dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (torch.empty((parts, b, hkv, m, x), dtype=dtype, device=q.device) for x in (d, e))
    _banded_dkv_kernel[(programs * parts,)](
        q, k, v, dout, lse, delta, dk, dv, lse if rule.q_offsets is None else rule.q_offsets,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        n, m, *rule.arguments, parts, scale, scale * LOG2E, LOG2E, hkv, hq // hkv,
        DK=d, DV=e, DK_PAD=power_of_two(d, 16), DV_PAD=power_of_two(e, 16),
        ROWS=launch.rows, HEADS=launch.heads, KEYS=launch.keys, WINDOW=rule.window is not None,
        HAS_OFFSETS=rule.q_offsets is not None, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if parts == 1:
        return dk[0], dv[0]
    return dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def launch_dq(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    rule: BandRule,
) -> torch.Tensor:
    """dq (b, hq, n, dk), contiguous, of q's dtype."""
    (b, hq, n, d), (_, hkv, m, e) = q.shape, v.shape
    launch = dq_launch(hq // hkv, d, e, q.dtype, device_of(q))
    dq = torch.empty((b, hq, n, d), dtype=q.dtype, device=q.device)
    _banded_dq_kernel[(-(-n // launch.queries) * b * (hq // launch.heads),)](
        q, k, v, dout, lse, delta, dq, lse if rule.q_offsets is None else rule.q_offsets,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        n, m, *rule.arguments, scale, scale * LOG2E, LOG2E, hq, hq // hkv,
        DK=d, DV=e, DK_PAD=power_of_two(d, 16), DV_PAD=power_of_two(e, 16),
        ROWS=launch.rows, HEADS=launch.heads, KEYS=launch.keys, WINDOW=rule.window is not None,
        HAS_OFFSETS=rule.q_offsets is not None, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return dq
