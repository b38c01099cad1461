"""Forward of banded attention, one program per tile of (query, head) rows:

    lo, hi = first key of the tile's first query, last key of its last query
    for each tile of keys in lo ... hi, those that every row sees whole first:
        s = q k^T, masked at the two edges
        m_i = max(m_i, max s);  l_i, acc rescaled by exp2((m_old - m_i) * scale * log2(e))
        p = exp2((s - m_i) * scale * log2(e));  l_i += sum p;  acc += p v
    out = acc / l_i,  lse = m_i * scale + ln l_i

Source: FlashAttention-2, arXiv 2307.08691, algorithm 1. The order of the keys does not matter to a softmax, so one loop serves
both edges. Later queries see more compressed keys: their tiles start first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .banded_launch import forward_launch
from .bands import BAND_ARGUMENTS, BandRule, band_start, band_stop, edge_tile, inner_tiles, load_rows, query_shift
from .items import tile_mask
from .launch import device_of, power_of_two
from .selected_forward import LN2, LOG2E


@triton.jit
def _attend(
    acc, m_i, l_i, q_tile, k_base, v_base, k_stride_n, v_stride_n, begin, lo, hi, tiles, start, stop, n_keys, log2_scale,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over `tiles` tiles of keys from `begin` on; if MASKED, those between lo and hi are left out."""
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    for tile in range(0, tiles):
        first = edge_tile(begin, lo, hi, tile, KEYS) if MASKED else begin + tile * KEYS
        key = first + tl.arange(0, KEYS)
        k_tile = load_rows(k_base, key, k_stride_n, c, key < n_keys, DK, DK_PAD, MASKED)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            seen = key[None, :] < stop[:, None]
            if WINDOW:
                seen = seen & (key[None, :] >= start[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = m_new
        if MASKED:  # a row that has seen no key yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        reference = m_safe * log2_scale
        alpha = tl.exp2(m_i * log2_scale - reference)
        p = tl.exp2(s * log2_scale - reference[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        v_tile = load_rows(v_base, key, v_stride_n, e, key < n_keys, DV, DV_PAD, MASKED)
        acc = acc * alpha[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(do_not_specialize=list(BAND_ARGUMENTS))
def _banded_forward_kernel(
    q, k, v, out, lse, offsets, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, n_queries, n_keys, window, stride, last, prefix, offset, log2_scale, hq, group,
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
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    q_row = batch * q_stride_b + head * q_stride_h + query.to(tl.int64) * q_stride_n
    q_tile = tl.load(q + q_row[:, None] + c[None, :], mask=tile_mask(live, c, DK, DK_PAD), other=0.0)
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
    m_i = tl.full((ROWS,), float("-inf"), tl.float32)
    l_i = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV_PAD), tl.float32)
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q_tile, k_base, v_base, k_stride_n, v_stride_n, lo, lo, hi, (hi - lo) // KEYS, start, stop, n_keys,
        log2_scale, DK, DV, DK_PAD, DV_PAD, KEYS, WINDOW, False,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q_tile, k_base, v_base, k_stride_n, v_stride_n, begin, lo, hi, edges, start, stop, n_keys,
        log2_scale, DK, DV, DK_PAD, DV_PAD, KEYS, WINDOW, True,
    )  # fmt: skip
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    total = tl.where(l_i == 0.0, float("-inf"), (m_i * log2_scale + tl.log2(l_safe)) * LN2)
    target = (batch * hq + head) * n_queries + query
    acc = acc / l_safe[:, None]
    tl.store(out + target[:, None] * DV + e[None, :], acc.to(out.dtype.element_ty), mask=tile_mask(live, e, DV, DV_PAD))
    tl.store(lse + target, total, mask=live)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: BandRule) -> tuple[torch.Tensor, torch.Tensor]:
    """out (b, hq, n, dv) and lse (b, hq, n); see `banded_attention_forward`."""
    (b, hq, n, dk), (_, hkv, m, dv) = q.shape, v.shape
    out = torch.empty((b, hq, n, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, hq, n), dtype=torch.float32, device=q.device)
    if 0 in (b, hq, n, m):
        return out.zero_(), lse.fill_(float("-inf"))
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
    launch = forward_launch(hq // hkv, dk, dv, q.dtype, device_of(q), rule.window is not None)
    _banded_forward_kernel[(-(-n // launch.queries) * b * (hq // launch.heads),)](
        q, k, v, out, lse, lse if rule.q_offsets is None else rule.q_offsets, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        n, m, *rule.arguments, scale * LOG2E, hq, hq // hkv,
        DK=dk, DV=dv, DK_PAD=power_of_two(dk, 16), DV_PAD=power_of_two(dv, 16),
        ROWS=launch.rows, HEADS=launch.heads, KEYS=launch.keys, WINDOW=rule.window is not None,
        HAS_OFFSETS=rule.q_offsets is not None, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out, lse
