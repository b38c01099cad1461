"""Backward of banded attention in three kernels, none of which uses atomics: two runs agree bit for bit.

    delta = rowsum(dO * O) - dLSE                                         _statistics_kernel
    for each tile of keys (and part of the queries that see it):          _banded_dkv_kernel, one program each
        for each tile of (query, head) rows from the first to the last query that sees a key of the tile:
            p^T  = exp2(k q^T * scale * log2(e) - lse * log2(e)), masked
            dV += p^T dO;  ds^T = p^T * (v dO^T - delta);  dK += ds^T q
    for each tile of (query, head) rows:                                  _banded_dq_kernel, one program each
        for each tile of keys, as in forward:  dQ += ds k

lse and delta are stored in the order of a tile's rows, (b, hq / heads, n, heads): a loop over tiles then loads neighbours.

The rows of a key tile run over the whole group, so dK and dV of a group add up in float32. Where there are few tiles of keys
(compressed attention), the queries of a tile are cut into parts that write float32 partials, summed afterwards.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 2; the transposed products keep P and dS in registers. dLSE enters as
d logit = p * (dP - rowsum(dO * O) + dLSE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .banded_launch import dkv_launch, dq_launch, query_splits, tile_heads
from .bands import BAND_ARGUMENTS, BandRule, band_start, band_stop, edge_tile, inner_tiles, load_at, load_rows, query_shift
from .bands import seen_from, seen_until
from .items import tile_mask
from .launch import device_of, power_of_two
from .selected_forward import LOG2E


@triton.jit
def _statistics_kernel(
    dout, out, lse, dlse, statistics, do_stride_b, do_stride_h, do_stride_n, o_stride_b, o_stride_h, o_stride_n,
    dl_stride_b, dl_stride_h, dl_stride_n, hq, n, size, log2e,
    DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, ROWS)
    query = ((tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = query < n
    line = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = line // hq, line % hq
    e = tl.arange(0, DV_PAD)
    mask = tile_mask(live, e, DV, DV_PAD)
    o_row = batch * o_stride_b + head * o_stride_h + query * o_stride_n
    do_row = batch * do_stride_b + head * do_stride_h + query * do_stride_n
    o = tl.load(out + o_row[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(dout + do_row[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    if HAS_DLSE:
        dl = dlse + batch * dl_stride_b + head * dl_stride_h + query * dl_stride_n
        delta -= tl.load(dl, mask=live, other=0.0).to(tl.float32)
    lse_i = tl.load(lse + line * n + query, mask=live, other=0.0)
    empty = lse_i == float("-inf")  # a row without keys has no weights to differentiate: anything finite will do
    target = statistics + ((line // HEADS) * n + query) * HEADS + line % HEADS
    tl.store(target, tl.where(empty, 0.0, lse_i * log2e), mask=live)
    tl.store(target + size, tl.where(empty, 0.0, delta), mask=live)


@triton.jit
def _ascend(
    dk_acc, dv_acc, k_tile, v_tile, q_rows, do_rows, statistics, size, q_stride_n, do_stride_n, begin, lo, hi, tiles, n_queries,
    from_query, until_query, log2_scale,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds ds^T q and p^T dO of `tiles` tiles of queries from `begin` on; if MASKED, those between lo and hi are left out.

    q_rows, do_rows, statistics: (ROWS,) where the rows of a tile at query 0 stand; delta stands `size` behind lse.
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    row = tl.arange(0, ROWS)
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    for tile in range(0, tiles):
        first = edge_tile(begin, lo, hi, tile, QUERIES) if MASKED else begin + tile * QUERIES
        wide = first.to(tl.int64)
        query = first + row // HEADS
        live = query < n_queries
        q_tile = load_at(q_rows + wide * q_stride_n, c, live, DK, DK_PAD, MASKED)
        at = statistics + wide * HEADS
        lse_i = tl.load(at, mask=live, other=0.0) if MASKED else tl.load(at)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * log2_scale - lse_i[None, :]
        if MASKED:
            seen = query[None, :] >= from_query[:, None]
            if WINDOW:
                seen = seen & (query[None, :] < until_query[:, None])
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s)
        do_tile = load_at(do_rows + wide * do_stride_n, e, live, DV, DV_PAD, MASKED)
        dv_acc += tl.dot(p.to(do_tile.dtype), do_tile, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        delta_i = tl.load(at + size, mask=live, other=0.0) if MASKED else tl.load(at + size)
        ds = (p * (dp - delta_i[None, :])).to(q_tile.dtype)
        dk_acc += tl.dot(ds, q_tile, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=[*BAND_ARGUMENTS, "parts"])
def _banded_dkv_kernel(
    q, k, v, dout, statistics, dk, dv, offsets, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, do_stride_b, do_stride_h, do_stride_n,
    n_queries, n_keys, window, stride, last, prefix, offset, parts, size, scale, log2_scale, hkv, group,
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

    # Every key of the tile is seen from the first query of its last key up to the last query of its first.
    inner_begin = seen_from(tl.minimum(tile * KEYS + KEYS, n_keys) - 1, shift, stride, last, prefix, n_queries)
    inner_end = seen_until(tile * KEYS, shift, window, n_queries, WINDOW)
    lo, hi, edges = inner_tiles(begin, end, inner_begin, inner_end, QUERIES)

    row = tl.arange(0, ROWS)
    dk_acc = tl.zeros((KEYS, DK_PAD), tl.float32)
    dv_acc = tl.zeros((KEYS, DV_PAD), tl.float32)
    for piece in range(0, group // HEADS):
        first_head = kv_head * group + piece * HEADS
        head, query = first_head + row % HEADS, (row // HEADS).to(tl.int64)
        q_rows = q + batch * q_stride_b + head * q_stride_h + query * q_stride_n
        do_rows = dout + batch * do_stride_b + head * do_stride_h + query * do_stride_n
        at = statistics + tl.multiple_of((batch * hkv * group + first_head) * n_queries, HEADS) + row
        dk_acc, dv_acc = _ascend(
            dk_acc, dv_acc, k_tile, v_tile, q_rows, do_rows, at, size, q_stride_n, do_stride_n, lo, lo, hi, (hi - lo) // QUERIES,
            n_queries, from_query, until_query, log2_scale, DK, DV, DK_PAD, DV_PAD, ROWS, HEADS, WINDOW, False,
        )  # fmt: skip
        dk_acc, dv_acc = _ascend(
            dk_acc, dv_acc, k_tile, v_tile, q_rows, do_rows, at, size, q_stride_n, do_stride_n, begin, lo, hi, edges,
            n_queries, from_query, until_query, log2_scale, DK, DV, DK_PAD, DV_PAD, ROWS, HEADS, WINDOW, True,
        )  # fmt: skip
    # dk and dv are (parts, b, hkv, m, d)
    target = (part.to(tl.int64) * lines + line) * n_keys + key
    dk_at = dk + target[:, None] * DK + c[None, :]
    dv_at = dv + target[:, None] * DV + e[None, :]
    tl.store(dk_at, (dk_acc * scale).to(dk.dtype.element_ty), mask=tile_mask(there, c, DK, DK_PAD))
    tl.store(dv_at, dv_acc.to(dv.dtype.element_ty), mask=tile_mask(there, e, DV, DV_PAD))


@triton.jit
def _descend(
    acc, q_tile, do_tile, lse_i, delta_i, k_base, v_base, k_stride_n, v_stride_n, begin, lo, hi, tiles, start, stop, n_keys,
    log2_scale, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds ds k of `tiles` tiles of keys from `begin` on; if MASKED, those between lo and hi are left out."""
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    for tile in range(0, tiles):
        first = edge_tile(begin, lo, hi, tile, KEYS) if MASKED else begin + tile * KEYS
        key = first + tl.arange(0, KEYS)
        k_tile = load_rows(k_base, key, k_stride_n, c, key < n_keys, DK, DK_PAD, MASKED)
        v_tile = load_rows(v_base, key, v_stride_n, e, key < n_keys, DV, DV_PAD, MASKED)
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
    q, k, v, dout, statistics, dq, offsets, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, do_stride_b, do_stride_h, do_stride_n,
    n_queries, n_keys, window, stride, last, prefix, offset, size, scale, log2_scale, hq, group,
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
    at = statistics + ((batch * hq + first_head) * n_queries + (wide - row // HEADS) * HEADS) + row
    lse_i = tl.load(at, mask=live, other=0.0)
    delta_i = tl.load(at + size, mask=live, other=0.0)
    k_base = k + batch * k_stride_b + kv_head * k_stride_h
    v_base = v + batch * v_stride_b + kv_head * v_stride_h

    start = band_start(query + shift, window, WINDOW)
    stop = band_stop(query + shift, stride, last, prefix, n_keys)
    front = tile * QUERIES + shift
    back = tl.minimum(tile * QUERIES + QUERIES, n_queries) - 1 + shift
    begin = band_start(front, window, WINDOW)
    end = band_stop(back, stride, last, prefix, n_keys)
    lo, hi, edges = inner_tiles(
        begin, end, band_start(back, window, WINDOW), band_stop(front, stride, last, prefix, n_keys), KEYS
    )
    acc = tl.zeros((ROWS, DK_PAD), tl.float32)
    acc = _descend(
        acc, q_tile, do_tile, lse_i, delta_i, k_base, v_base, k_stride_n, v_stride_n, lo, lo, hi, (hi - lo) // KEYS, start, stop,
        n_keys, log2_scale, DK, DV, DK_PAD, DV_PAD, KEYS, WINDOW, False,
    )  # fmt: skip
    acc = _descend(
        acc, q_tile, do_tile, lse_i, delta_i, k_base, v_base, k_stride_n, v_stride_n, begin, lo, hi, edges, start, stop,
        n_keys, log2_scale, DK, DV, DK_PAD, DV_PAD, KEYS, WINDOW, True,
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
    statistics = row_statistics(dout, out, lse, dlse, tile_heads(q.shape[1] // k.shape[1]))
    dk, dv = launch_dkv(dout, q, k, v, statistics, scale, rule)
    return launch_dq(dout, q, k, v, statistics, scale, rule), dk, dv


def row_statistics(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None, heads: int
) -> torch.Tensor:
    """lse in base 2, and rowsum(dout * out) - dlse, for tiles of `heads` heads: (2, b, hq / heads, n, heads) float32.

    Args:
        dout, out: (b, hq, n, dv).
        lse: (b, hq, n) float32, contiguous.
        dlse: (b, hq, n), or None.
        heads: A divisor of hq.
    """
    b, hq, n, dv = out.shape
    statistics = torch.empty((2, b, hq // heads, n, heads), dtype=torch.float32, device=out.device)
    rows = 32
    strides = (0, 0, 0) if dlse is None else dlse.stride()
    _statistics_kernel[(-(-n // rows) * b * hq,)](
        dout, out, lse, lse if dlse is None else dlse, statistics, *dout.stride()[:3], *out.stride()[:3], *strides,
        hq, n, b * hq * n, LOG2E, DV=dv, DV_PAD=power_of_two(dv, 16), ROWS=rows, HEADS=heads, HAS_DLSE=dlse is not None,
        num_warps=4,
    )  # fmt: skip
    return statistics


def launch_dkv(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    statistics: torch.Tensor,
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
        q, k, v, dout, statistics, dk, dv, statistics if rule.q_offsets is None else rule.q_offsets,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        n, m, *rule.arguments, parts, b * hq * n, scale, scale * LOG2E, hkv, hq // hkv,
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
    statistics: torch.Tensor,
    scale: float,
    rule: BandRule,
) -> torch.Tensor:
    """dq (b, hq, n, dk), contiguous, of q's dtype."""
    (b, hq, n, d), (_, hkv, m, e) = q.shape, v.shape
    launch = dq_launch(hq // hkv, d, e, q.dtype, device_of(q), rule.window is not None)
    dq = torch.empty((b, hq, n, d), dtype=q.dtype, device=q.device)
    _banded_dq_kernel[(-(-n // launch.queries) * b * (hq // launch.heads),)](
        q, k, v, dout, statistics, dq, statistics if rule.q_offsets is None else rule.q_offsets,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        n, m, *rule.arguments, b * hq * n, scale, scale * LOG2E, hq, hq // hkv,
        DK=d, DV=e, DK_PAD=power_of_two(d, 16), DV_PAD=power_of_two(e, 16),
        ROWS=launch.rows, HEADS=launch.heads, KEYS=launch.keys, WINDOW=rule.window is not None,
        HAS_OFFSETS=rule.q_offsets is not None, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return dq
