"""Forward of selected attention: dense blocks query outer (`selected_dense`), the others key/value-block outer.

    for each work item (a block, some queries that list it):              _partial_kernel, one program each
        load K, V of the block once
        for each tile of (query, head) rows of the item:
            s = q k^T * scale * log2(e), masked;  m_i = max s;  l_i = sum exp2(s - m_i)
            acc = exp2(s - m_i) v / l_i                                    a partial, normalised by its own row sum
            store acc in the input dtype, m_i + log2(l_i) in float32
    for each (query, head):                                               _merge_kernel, one program each
        out = sum_t exp2(lse_t - lse) acc_t,  lse = log2 sum_t exp2(lse_t), what the dense blocks gave being one of the t

Loop order: Flash Sparse Attention, arXiv 2508.18224. What is computed: the selected branch of Native Sparse Attention,
arXiv 2502.11089. Online softmax and merge: FlashAttention-2, arXiv 2307.08691. Unlike the released FSA, every partial has
its own (m_i, l_i): no second pass over Q K^T, no reference score that could overflow, no buffer to clear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .items import CHANGING, LN2, LOG2E, last_visible, load_item, tile_mask
from .launch import PARTIAL_BYTES, PLAN_BYTES, PLAN_ENTRY_BYTES, WHOLE_BYTES, Launch, dense_launch, device_of
from .launch import forward_launch, power_of_two, slice_queries
from .launcher import fork, join, run
from .plan import Plan, Positions, build_plan, cut
from .selected_dense import launch_dense
from .selected_partial_hopper import partial_kernel


SMALL = 1 << 24
"""Elements of q below which a single launch of each kernel does without a second stream."""


@triton.jit(do_not_specialize=list(CHANGING))
def _partial_kernel(
    q, k, v, partial, partial_lse, order, item_starts, item_block, item_first, item_length, offsets,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_index_heads, lanes_per_kv,
    first_lane, begin_lane, slice_index, n_slices, slice_length, capacity, n_keys, n_blocks, offset, log2_scale,
    G: tl.constexpr, T: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, RULE: tl.constexpr, HAS_OFFSETS: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_PAD: tl.constexpr,
):  # fmt: skip
    store = tl.program_id(0) // capacity  # lane of the scratch; the plan starts at first_lane, this launch at begin_lane
    item = tl.program_id(0) % capacity
    lane = begin_lane + store
    segment = (lane - first_lane).to(tl.int64) * n_slices + slice_index
    block, first, length = load_item(
        item_starts, item_block, item_first, item_length, segment, item, n_blocks, capacity
    )
    if length == 0:
        return
    batch = (lane // n_index_heads).to(tl.int64)
    index_head = lane % n_index_heads
    if HAS_OFFSETS:
        shift = tl.load(offsets + batch).to(tl.int32)
    else:
        shift = offset
    # Offsets inside a slice fit into 32 bits, except with huge strides.
    q_base = q + batch * q_stride_b + (index_head * G).to(tl.int64) * q_stride_h
    q_base += (slice_index * slice_length).to(tl.int64) * q_stride_n
    k_base = k + batch * k_stride_b + (index_head // lanes_per_kv).to(tl.int64) * k_stride_h
    v_base = v + batch * v_stride_b + (index_head // lanes_per_kv).to(tl.int64) * v_stride_h
    entries = order + segment * slice_length * T + first
    partial += store.to(tl.int64) * slice_length * T * G * DV
    partial_lse += store.to(tl.int64) * slice_length * T * G

    row = tl.arange(0, ROWS)
    within = row // G
    g = row % G
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    key = block * BLOCK_SIZE + tl.arange(0, KEYS)
    if KEYS == BLOCK_PAD:  # one tile covers the block: load it once for all queries
        there = key < n_keys
        k_at = k_base + key.to(tl.int64)[:, None] * k_stride_n + c[None, :]
        v_at = v_base + key.to(tl.int64)[:, None] * v_stride_n + e[None, :]
        k_tile = tl.load(k_at, mask=tile_mask(there, c, DK, DK_PAD), other=0.0)
        v_tile = tl.load(v_at, mask=tile_mask(there, e, DV, DV_PAD), other=0.0)
    for done in range(0, length, QUERIES):
        live = (within < QUERIES) & (done + within < length)
        pair = tl.load(entries + done + within, mask=live, other=0)
        local = pair // T
        if WIDE:
            q_row = local.to(tl.int64) * q_stride_n + g.to(tl.int64) * q_stride_h
        else:
            q_row = local * q_stride_n + g * q_stride_h
        q_at = q_base + q_row[:, None] + c[None, :]
        q_tile = tl.load(q_at, mask=tile_mask(live, c, DK, DK_PAD), other=0.0, eviction_policy="evict_last")
        if MASKED:
            last = last_visible(slice_index * slice_length + local + shift, block, n_keys, BLOCK_SIZE, RULE)
        if KEYS == BLOCK_PAD:
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale
            if MASKED:
                s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
            m_i = tl.max(s, 1)
            if MASKED:
                m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
            p = tl.exp2(s - m_i[:, None])
            l_i = tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        else:
            m_i = tl.full((ROWS,), float("-inf"), tl.float32)
            l_i = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, DV_PAD), tl.float32)
            for ahead in range(0, BLOCK_SIZE, KEYS):
                at = key + ahead
                there = at < n_keys
                k_at = k_base + at.to(tl.int64)[:, None] * k_stride_n + c[None, :]
                v_at = v_base + at.to(tl.int64)[:, None] * v_stride_n + e[None, :]
                k_part = tl.load(k_at, mask=tile_mask(there, c, DK, DK_PAD), other=0.0)
                v_part = tl.load(v_at, mask=tile_mask(there, e, DV, DV_PAD), other=0.0)
                s = tl.dot(q_tile, tl.trans(k_part), input_precision="ieee") * log2_scale
                if MASKED:
                    s = tl.where(at[None, :] <= last[:, None], s, float("-inf"))
                m_new = tl.maximum(m_i, tl.max(s, 1))
                m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                alpha = tl.exp2(m_i - m_safe)
                p = tl.exp2(s - m_safe[:, None])
                l_i = l_i * alpha + tl.sum(p, 1)
                acc = acc * alpha[:, None] + tl.dot(p.to(v_part.dtype), v_part, input_precision="ieee")
                m_i = m_new
        l_safe = tl.where(l_i == 0.0, 1.0, l_i)
        acc = acc * (1.0 / l_safe)[:, None]
        slot = pair * G + g
        to = partial + slot[:, None] * DV + e[None, :]  # read once, much later: rows of q stay in the cache instead
        tl.store(to, acc.to(partial.dtype.element_ty), mask=tile_mask(live, e, DV, DV_PAD), cache_modifier=".cs")
        tl.store(partial_lse + slot, tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_safe)), mask=live)


@triton.jit(do_not_specialize=["first_lane", "begin_lane", "slice_index", "n_slices", "slice_length", "n_queries"])
def _merge_kernel(
    partial, partial_lse, kept, out, lse, o_stride_b, o_stride_h, o_stride_n, l_stride_b, l_stride_h,
    n_index_heads, first_lane, begin_lane, slice_index, n_slices, slice_length, n_queries,
    G: tl.constexpr, T: tl.constexpr, T_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, T_TILE: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % G
    local = (tl.program_id(0) // G) % n_queries
    store = tl.program_id(0) // (G * n_queries)
    lane = begin_lane + store
    query = (slice_index * slice_length + local).to(tl.int64)
    batch = (lane // n_index_heads).to(tl.int64)
    head = ((lane % n_index_heads) * G + g).to(tl.int64)
    blocks = kept + ((lane - first_lane).to(tl.int64) * n_slices * slice_length + query) * T
    slots = (store.to(tl.int64) * slice_length + local) * T
    t = tl.arange(0, T_PAD)
    entry = tl.load(blocks + t, mask=t < T, other=-1) >= 0
    lse_t = tl.load(partial_lse + (slots + t) * G + g, mask=entry, other=float("-inf"))
    m_i = tl.max(lse_t, 0)
    lse_at = lse + batch * l_stride_b + head * l_stride_h + query
    e = tl.arange(0, DV_PAD)
    o_at = out + batch * o_stride_b + head * o_stride_h + query * o_stride_n + e
    acc = tl.zeros((DV_PAD,), tl.float32)
    if DENSE:
        if m_i == float("-inf"):  # nothing to add to what the dense blocks gave
            return
        dense = tl.load(lse_at) / LN2
        m_i = tl.maximum(m_i, dense)
        before = tl.exp2(dense - m_i)
        l_i = before + tl.sum(tl.exp2(lse_t - m_i), 0)
        acc += tl.load(o_at, mask=e < DV, other=0.0).to(tl.float32) * before
    else:
        m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
        l_i = tl.sum(tl.exp2(lse_t - m_i), 0)
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    total = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_safe))
    for begin in range(0, T, T_TILE):
        at = begin + tl.arange(0, T_TILE)
        some = tl.load(blocks + at, mask=at < T, other=-1) >= 0
        weight = tl.load(partial_lse + (slots + at) * G + g, mask=some, other=float("-inf"))
        weight = tl.exp2(weight - m_i)
        slot = (slots + at) * G + g
        o_t = tl.load(partial + slot[:, None] * DV + e[None, :], mask=tile_mask(some, e, DV, DV_PAD), other=0.0)
        acc += tl.sum(o_t.to(tl.float32) * weight[:, None], 0)
    acc = acc / l_safe
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=e < DV)
    tl.store(lse_at, total * LN2)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    scale: float,
    rule: str,
    positions: Positions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected attention, some lanes and one slice of queries at a time; see `selected_attention_forward`."""
    (b, hq, n, dk), (_, _, m, dv), (_, hi, _, t) = q.shape, v.shape, indices.shape
    out = torch.empty((b, hq, n, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, hq, n), dtype=torch.float32, device=q.device)
    if 0 in (b, hq, n, m, t):
        return out.zero_(), lse.fill_(float("-inf"))
    group = hq // hi
    device = device_of(q)
    launch = forward_launch(group, block_size, dk, dv, q.dtype, device)
    dense = dense_launch(group, t, block_size, dk, dv, q.dtype, device)
    # Few lanes with many queries each rather than the reverse: a block is then loaded for more queries at a time.
    query_bytes = group * t * (dv * q.element_size() + 4)
    budget = WHOLE_BYTES if b * hi * n * query_bytes <= WHOLE_BYTES else PARTIAL_BYTES // 2
    together = len(next(cut(range(b * hi), n * query_bytes, budget)))
    slice_length = slice_queries(n, together * query_bytes, budget)
    alone = together == b * hi and slice_length == n
    buffers = [
        (torch.empty((together, slice_length * t, group, dv), dtype=q.dtype, device=q.device),
         torch.empty((together, slice_length * t, group), dtype=torch.float32, device=q.device))
        for _ in range(1 if alone else 2)
    ]  # fmt: skip
    turn = 0
    for planned in cut(range(b * hi), n * t * PLAN_ENTRY_BYTES, PLAN_BYTES):
        plan = build_plan(
            indices, planned, m, block_size, rule, positions, slice_length, launch.item_queries, launch.queries,
            dense_queries=dense.item_queries if dense else 0,
        )
        # Two streams take turns: the end of one kernel, when half of the device is idle, is the beginning of another. The
        # host takes too long to arrange that where there is little to do.
        side = None if alone and q.numel() < SMALL else fork(q)
        streams = (None,) if alone else (None, side)
        if dense is not None:
            launch_dense(q, k, v, out, lse, plan, group, block_size, scale, rule, positions, dense, side)
            dense_done = None if side is None else side.record_event()
        for lanes in cut(planned, n * query_bytes, budget):
            for index in range(plan.slices):
                buffer, stream = buffers[turn % len(buffers)], streams[turn % len(streams)]
                launch_partial(q, k, v, *buffer, plan, lanes, index, block_size, scale, rule, positions, launch, stream)
                if stream is None and dense is not None and dense_done is not None:
                    torch.cuda.current_stream(q.device).wait_event(dense_done)
                    dense_done = None
                launch_merge(*buffer, out, lse, plan, lanes, index, stream)
                turn += 1
        join(side)
    return out, lse


def launch_partial(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    plan: Plan,
    lanes: range,
    index: int,
    block_size: int,
    scale: float,
    rule: str,
    positions: Positions,
    launch: Launch,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Partials of slice `index`: partial (lanes, slice_length * t, g, dv), partial_lse (lanes, slice_length * t, g), base 2."""
    (_, hq, _, dk), (_, hkv, m, dv), offsets, group = q.shape, v.shape, positions.offsets, partial.shape[2]
    hi, whole = hq // group, m % block_size == 0 and block_size == power_of_two(block_size, 16)
    programs = len(lanes) * plan.capacity
    tensors = (
        q, k, v, partial, partial_lse, plan.order, plan.item_starts, plan.item_block, plan.item_first, plan.item_length,
        plan.order if offsets is None else offsets,
    )  # fmt: skip
    fixed = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], hi, hi // hkv)
    varying = (
        plan.lanes.start, lanes.start, index, plan.slices, plan.slice_length, plan.capacity, m, plan.blocks, positions.offset,
        scale * LOG2E,
    )  # fmt: skip
    constants = dict(
        G=group, T=plan.kept.shape[-1], DK=dk, DV=dv, BLOCK_SIZE=block_size, ROWS=launch.rows, QUERIES=launch.queries,
        KEYS=launch.keys, RULE=rule, HAS_OFFSETS=offsets is not None, MASKED=plan.dense is None or not whole,
        WIDE=plan.slice_length * q.stride(2) + group * q.stride(1) >= 2**31,
    )  # fmt: skip
    if launch.hopper and all(stride % 16 == 0 for x in (q, k, v) for stride in x.stride()[:3]):
        options = {"num_warps": launch.warps, "maxnreg": launch.registers}
        run(partial_kernel, programs, tensors, fixed, varying, {**constants, "WARPS": launch.warps}, stream, **options)
        return
    padded = {
        **constants, "DK_PAD": power_of_two(dk, 16), "DV_PAD": power_of_two(dv, 16), "BLOCK_PAD": power_of_two(block_size, 16),
    }  # fmt: skip
    run(
        _partial_kernel, programs, tensors, fixed, varying, padded, stream,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip


def launch_merge(
    partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, plan: Plan, lanes: range, index: int,
    stream: torch.cuda.Stream | None = None,
) -> None:  # fmt: skip
    """Merge the partials of slice `index` into out (b, hq, n, dv) and lse (b, hq, n), natural logarithm."""
    _, hq, n, dv = out.shape
    group, t = partial.shape[2], plan.kept.shape[-1]
    queries = min(plan.slice_length, n - index * plan.slice_length)
    dv_pad, t_pad = power_of_two(dv, 16), power_of_two(t)
    tile = min(t_pad, max(1, 4096 // dv_pad))
    run(
        _merge_kernel, len(lanes) * queries * group, (partial, partial_lse, plan.kept, out, lse),
        (*out.stride()[:3], *lse.stride()[:2], hq // group),
        (plan.lanes.start, lanes.start, index, plan.slices, plan.slice_length, queries),
        dict(G=group, T=t, T_PAD=t_pad, DV=dv, DV_PAD=dv_pad, T_TILE=tile, DENSE=plan.dense is not None),
        stream, num_warps=1 if tile * dv_pad <= 2048 else 2,
    )  # fmt: skip
