"""Forward of selected attention over dense blocks, query outer: no partials.

    for each tile of queries, all heads that share its index list:        _dense_kernel, one program each
        for each block that many of the tile's queries list (`plan.DenseBlocks`):
            s = q k^T * scale * log2(e), masked by who lists the block and by the rule;  online softmax
        store out in the input dtype and lse: a partial that the merge of `selected_forward` starts from

Blocks that neighbouring queries share (the first, the own, the previous one; most of them where the selection is correlated)
are loaded once per tile, and their results stay in registers.

Sources: FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .items import LN2, LOG2E, last_visible, tile_mask
from .launch import Launch, power_of_two
from .launcher import run
from .plan import Plan, Positions
from .selected_dense_hopper import dense_kernel


@triton.jit(do_not_specialize=["first_lane", "n_queries", "n_keys", "tiles", "offset"])
def _dense_kernel(
    q, k, v, out, lse, dense_count, dense_block, dense_members, offsets,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    o_stride_b, o_stride_h, o_stride_n, l_stride_b, l_stride_h,
    n_index_heads, lanes_per_kv, first_lane, n_queries, n_keys, tiles, offset, log2_scale,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    TILE_QUERIES: tl.constexpr, KEYS: tl.constexpr, CAPACITY: tl.constexpr, RULE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = TILE_QUERIES // QUERIES
    STEPS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    part = tl.program_id(0) % PARTS
    tile = (tl.program_id(0) // PARTS) % tiles
    plan_lane = tl.program_id(0) // (PARTS * tiles)
    lane = first_lane + plan_lane
    batch = (lane // n_index_heads).to(tl.int64)
    index_head = lane % n_index_heads
    kv_head = (index_head // lanes_per_kv).to(tl.int64)
    if HAS_OFFSETS:
        shift = tl.load(offsets + batch).to(tl.int32)
    else:
        shift = offset
    row = tl.arange(0, ROWS)
    of_tile = part * QUERIES + row // G
    query = tile * TILE_QUERIES + of_tile
    live = (row < QUERIES * G) & (query < n_queries)
    head = (index_head * G + row % G).to(tl.int64)
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    q_row = batch * q_stride_b + head * q_stride_h + query.to(tl.int64) * q_stride_n
    q_tile = tl.load(q + q_row[:, None] + c[None, :], mask=tile_mask(live, c, DK, DK_PAD), other=0.0)
    k_base = k + batch * k_stride_b + kv_head * k_stride_h
    v_base = v + batch * v_stride_b + kv_head * v_stride_h
    m_i = tl.full((ROWS,), float("-inf"), tl.float32)
    l_i = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV_PAD), tl.float32)
    listed = plan_lane * tiles + tile
    steps = tl.load(dense_count + listed) * STEPS
    blocks = dense_block + listed.to(tl.int64) * CAPACITY
    members = dense_members + listed.to(tl.int64) * CAPACITY
    for step in range(steps):
        block = tl.load(blocks + step // STEPS)
        key = (step % STEPS) * KEYS + tl.arange(0, KEYS)
        there = key < BLOCK_SIZE
        key += block * BLOCK_SIZE
        there = there & (key < n_keys)
        k_at = k_base + key.to(tl.int64)[:, None] * k_stride_n + c[None, :]
        v_at = v_base + key.to(tl.int64)[:, None] * v_stride_n + e[None, :]
        k_tile = tl.load(k_at, mask=tile_mask(there, c, DK, DK_PAD), other=0.0)
        v_tile = tl.load(v_at, mask=tile_mask(there, e, DV, DV_PAD), other=0.0)
        word = tl.load(members + step // STEPS)
        member = (word >> of_tile.to(word.dtype)) & 1
        last = last_visible(query + shift, block, n_keys, BLOCK_SIZE, RULE)
        last = tl.where(live & (member != 0), last, -1)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale
        s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        m_i = m_new
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    acc = acc * (1.0 / l_safe)[:, None]
    o_row = out + batch * o_stride_b + head * o_stride_h + query.to(tl.int64) * o_stride_n
    tl.store(o_row[:, None] + e[None, :], acc.to(out.dtype.element_ty), mask=tile_mask(live, e, DV, DV_PAD))
    total = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_safe)) * LN2)
    tl.store(lse + batch * l_stride_b + head * l_stride_h + query, total, mask=live)


def launch_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    group: int,
    block_size: int,
    scale: float,
    rule: str,
    positions: Positions,
    launch: Launch,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Attention of the plan's lanes over their dense blocks: out (b, hq, n, dv) and lse (b, hq, n), natural logarithm."""
    (_, hq, n, dk), (_, hkv, m, dv), offsets, dense = q.shape, v.shape, positions.offsets, plan.dense
    tiles, hi, queries = dense.count.shape[1], hq // group, min(dense.queries, launch.queries)
    programs = len(plan.lanes) * tiles * (dense.queries // queries)
    tensors = q, k, v, out, lse, dense.count, dense.block, dense.members, dense.count if offsets is None else offsets
    fixed = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2], hi, hi // hkv,
    )  # fmt: skip
    varying = plan.lanes.start, n, m, tiles, positions.offset, scale * LOG2E
    constants = dict(
        G=group, DK=dk, DV=dv, BLOCK_SIZE=block_size, ROWS=launch.rows, QUERIES=queries, TILE_QUERIES=dense.queries,
        KEYS=launch.keys, CAPACITY=dense.block.shape[2], RULE=rule, HAS_OFFSETS=offsets is not None,
    )  # fmt: skip
    aligned = all(stride % 16 == 0 for x in (q, k, v, out) for stride in x.stride()[:3])
    if launch.hopper and aligned and m % block_size == 0:
        run(
            dense_kernel, programs, tensors, fixed, varying, {**constants, "WARPS": launch.warps}, stream,
            num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
        return
    padded = {**constants, "DK_PAD": power_of_two(dk, 16), "DV_PAD": power_of_two(dv, 16)}
    run(
        _dense_kernel, programs, tensors, fixed, varying, padded, stream,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
