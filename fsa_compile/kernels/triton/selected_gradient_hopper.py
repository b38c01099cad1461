"""The gradient kernel of `selected_backward` for Hopper, in Gluon, where the order of copies and products can be said.

    rows of Q and dO of the first tile:  to shared memory
    for each tile of (query, head) rows of the item:
        wait for its rows;  start the copy of the next tile's
        start S = Q K^T and dP = dO V^T
        wait for S;   P  = exp2(S * scale * log2(e) - lse * log2(e)), masked, to shared memory
        wait for dP;  dS = P * (dP - delta), to shared memory
        start dQ = dS K, dV += dO^T P, dK += Q^T dS
        wait for dQ; store it, while the tensor cores work on the other two

Triton's own pipeline starts the copy of a tile whose row numbers are themselves loaded at the end of the tile before, and waits
for it at once; and it waits for each product where it stands.

Source: as `selected_backward`. Rows past an item's end repeat its last one and have P = 0, so that nothing is masked on its way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .items import CHANGING, last_visible, load_item

load_work_item, last_visible_block = gluon.jit(load_item.fn), gluon.jit(last_visible.fn)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the names of Triton 3.7 and 3.6
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

@gluon.jit(do_not_specialize=list(CHANGING))
def gradient_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, order, item_starts, item_block, item_first, item_length, offsets,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    do_stride_b, do_stride_h, do_stride_n, l_stride_b, l_stride_h, d_stride_b, d_stride_h,
    n_index_heads, lanes_per_kv,
    first_lane, begin_lane, slice_index, n_slices, slice_length, capacity, n_keys, n_blocks, offset, scale, log2_scale, log2e,
    G: gl.constexpr, T: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, PARTS: gl.constexpr, RULE: gl.constexpr, HAS_OFFSETS: gl.constexpr,
    DETERMINISTIC: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """See `selected_backward._gradient_kernel`, whose arguments these are."""
    part = gl.program_id(0) % PARTS
    item = (gl.program_id(0) // PARTS) % capacity
    store = gl.program_id(0) // (PARTS * capacity)
    lane = begin_lane + store
    segment = (lane - first_lane).to(gl.int64) * n_slices + slice_index
    block, first, length = load_work_item(item_starts, item_block, item_first, item_length, segment, item, n_blocks, capacity)
    if length == 0:
        return
    batch = (lane // n_index_heads).to(gl.int64)
    index_head = lane % n_index_heads
    kv_head = (index_head // lanes_per_kv).to(gl.int64)
    if HAS_OFFSETS:
        shift = gl.load(offsets + batch).to(gl.int32)
    else:
        shift = offset
    entries = order + segment * slice_length * T + first

    dtype: gl.constexpr = q.dtype.element_ty
    k_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [WARPS, 1], [1, 0])
    v_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [WARPS, 1], [1, 0])
    k_sums: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32] if DK >= 128 else [2, 16], [WARPS, 1], [1, 0])
    v_sums: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32] if DV >= 128 else [2, 16], [WARPS, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    k_across: gl.constexpr = DK // 16 if DK < 16 * WARPS else WARPS
    v_across: gl.constexpr = DV // 16 if DV < 16 * WARPS else WARPS
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [k_across, WARPS // k_across], [16, KEYS * k_across // WARPS, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [v_across, WARPS // v_across], [16, KEYS * v_across // WARPS, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DK, 16])
    k_shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    p_shared: gl.constexpr = gl.NVMMASharedLayout(KEYS * 2 if KEYS < 64 else 128, 16, 2)

    first_head = (index_head * G).to(gl.int64)
    first_query = (slice_index * slice_length).to(gl.int64)
    q_base = q + batch * q_stride_b + first_head * q_stride_h + first_query * q_stride_n
    do_base = dout + batch * do_stride_b + first_head * do_stride_h + first_query * do_stride_n
    lse_base = lse + batch * l_stride_b + first_head * l_stride_h + first_query
    delta_base = delta + batch * d_stride_b + first_head * d_stride_h + first_query
    dq_base = dq + store.to(gl.int64) * slice_length * (T * G * PARTS * DK) + part * DK

    # K and V of the tile
    k_smem = gl.allocate_shared_memory(dtype, [KEYS, DK], k_shared)
    v_smem = gl.allocate_shared_memory(dtype, [KEYS, DV], k_shared)
    k_local = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, k_rows))
    v_local = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, v_rows))
    k_key, v_key = block * BLOCK_SIZE + k_local, block * BLOCK_SIZE + v_local
    c = gl.arange(0, DK, layout=gl.SliceLayout(0, k_rows))
    e = gl.arange(0, DV, layout=gl.SliceLayout(0, v_rows))
    k_at = k + batch * k_stride_b + kv_head * k_stride_h + k_key.to(gl.int64)[:, None] * k_stride_n + c[None, :]
    v_at = v + batch * v_stride_b + kv_head * v_stride_h + v_key.to(gl.int64)[:, None] * v_stride_n + e[None, :]
    k_smem.store(gl.load(k_at, mask=((k_key < n_keys) & (k_local < BLOCK_SIZE))[:, None], other=0.0))
    v_smem.store(gl.load(v_at, mask=((v_key < n_keys) & (v_local < BLOCK_SIZE))[:, None], other=0.0))

    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, DK], k_shared)
    do_smem = gl.allocate_shared_memory(dtype, [2, ROWS, DV], k_shared)
    p_smem = gl.allocate_shared_memory(dtype, [ROWS, KEYS], p_shared)
    ds_smem = gl.allocate_shared_memory(dtype, [ROWS, KEYS], p_shared)

    # A tile's rows in the layouts of the copies of Q and dO, of the stores of dQ (as Q), and of the logits.
    q_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, k_rows))
    do_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, v_rows))
    s_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, logits))
    key = block * BLOCK_SIZE + part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, logits))
    q_pair = gl.load(entries + gl.minimum(q_row // G, length - 1))
    do_pair = gl.load(entries + gl.minimum(do_row // G, length - 1))
    s_pair = gl.load(entries + gl.minimum(s_row // G, length - 1))
    if WIDE:
        q_pair, do_pair, s_pair = q_pair.to(gl.int64), do_pair.to(gl.int64), s_pair.to(gl.int64)
    q_at = q_base + (q_pair // T * q_stride_n + q_row % G * q_stride_h)[:, None] + c[None, :]
    do_at = do_base + (do_pair // T * do_stride_n + do_row % G * do_stride_h)[:, None] + e[None, :]
    copy_async(q_smem.index(0), q_at)
    copy_async(do_smem.index(0), do_at)
    async_copy.commit_group()
    lse_i = gl.load(lse_base + s_row % G * l_stride_h + s_pair // T)
    delta_i = gl.load(delta_base + s_row % G * d_stride_h + s_pair // T)
    dq_slot = (q_pair * G + q_row % G) * (PARTS * DK)
    local = (s_pair // T).to(gl.int32)
    q_pair = gl.load(entries + gl.minimum(QUERIES + q_row // G, length - 1))
    do_pair = gl.load(entries + gl.minimum(QUERIES + do_row // G, length - 1))
    s_pair = gl.load(entries + gl.minimum(QUERIES + s_row // G, length - 1))

    dk_acc = gl.zeros([DK, KEYS], gl.float32, dk_layout)
    dv_acc = gl.zeros([DV, KEYS], gl.float32, dv_layout)
    turn = 0
    for done in range(0, length, QUERIES):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()  # all have seen the copy, and all are done with the other half
        if WIDE:
            q_pair, do_pair, s_pair = q_pair.to(gl.int64), do_pair.to(gl.int64), s_pair.to(gl.int64)
        if done + QUERIES < length:
            q_at = q_base + (q_pair // T * q_stride_n + q_row % G * q_stride_h)[:, None] + c[None, :]
            do_at = do_base + (do_pair // T * do_stride_n + do_row % G * do_stride_h)[:, None] + e[None, :]
            copy_async(q_smem.index(1 - turn), q_at)
            copy_async(do_smem.index(1 - turn), do_at)
            async_copy.commit_group()
        q_tile, do_tile = q_smem.index(turn), do_smem.index(turn)
        s = warpgroup_mma(
            q_tile, k_smem.permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, logits), use_acc=False, is_async=True
        )
        dp = warpgroup_mma(
            do_tile, v_smem.permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, logits), use_acc=False, is_async=True
        )
        # What the next tile needs to know of its rows arrives meanwhile.
        next_lse = gl.load(lse_base + s_row % G * l_stride_h + s_pair // T)
        next_delta = gl.load(delta_base + s_row % G * d_stride_h + s_pair // T)
        next_slot = (q_pair * G + q_row % G) * (PARTS * DK)
        next_local = (s_pair // T).to(gl.int32)
        ahead = done + 2 * QUERIES
        q_pair = gl.load(entries + gl.minimum(ahead + q_row // G, length - 1))
        do_pair = gl.load(entries + gl.minimum(ahead + do_row // G, length - 1))
        s_pair = gl.load(entries + gl.minimum(ahead + s_row // G, length - 1))

        live = (s_row // G < QUERIES) & (done + s_row // G < length)
        last = last_visible_block(slice_index * slice_length + local + shift, block, n_keys, BLOCK_SIZE, RULE)
        last = gl.where(live, last, -1)
        shifted = lse_i * log2e
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(gl.where(key[None, :] <= last[:, None], s * log2_scale - shifted[:, None], float("-inf")))
        p_smem.store(p.to(dtype))
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds_smem.store((p * (dp - delta_i[:, None])).to(dtype))
        fence_async_shared()
        barrier()
        dq_tile = warpgroup_mma(
            ds_smem, k_smem, gl.zeros([ROWS, DK], gl.float32, dq_layout), use_acc=False, is_async=True
        )
        dv_acc = warpgroup_mma(do_tile.permute((1, 0)), p_smem, dv_acc, is_async=True)
        dk_acc = warpgroup_mma(q_tile.permute((1, 0)), ds_smem, dk_acc, is_async=True)
        dq_tile = warpgroup_mma_wait(2, deps=[dq_tile])
        dq_rows = gl.convert_layout((dq_tile * scale).to(dtype), k_rows)
        stored = (q_row // G < QUERIES) & (done + q_row // G < length)
        gl.store(dq_base + dq_slot[:, None] + c[None, :], dq_rows, mask=stored[:, None])
        dv_acc, dk_acc = warpgroup_mma_wait(0, deps=[dv_acc, dk_acc])
        lse_i, delta_i, dq_slot, local = next_lse, next_delta, next_slot, next_local
        turn = 1 - turn

    dk_rows = gl.convert_layout((dk_acc * scale).permute((1, 0)), k_sums)
    dv_rows = gl.convert_layout(dv_acc.permute((1, 0)), v_sums)
    k_local = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, k_sums))
    v_local = part * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, v_sums))
    k_key, v_key = block * BLOCK_SIZE + k_local, block * BLOCK_SIZE + v_local
    k_there, v_there = (k_key < n_keys) & (k_local < BLOCK_SIZE), (v_key < n_keys) & (v_local < BLOCK_SIZE)
    c = gl.arange(0, DK, layout=gl.SliceLayout(0, k_sums))
    e = gl.arange(0, DV, layout=gl.SliceLayout(0, v_sums))
    if DETERMINISTIC:  # dk and dv are (lanes, capacity, block_size, d)
        item_row = (store.to(gl.int64) * capacity + item) * BLOCK_SIZE
        gl.store(dk + (item_row + k_local)[:, None] * DK + c[None, :], dk_rows, mask=k_there[:, None])
        gl.store(dv + (item_row + v_local)[:, None] * DV + e[None, :], dv_rows, mask=v_there[:, None])
    else:  # dk and dv are (lanes / lanes_per_kv, m, d)
        lane_row = (store // lanes_per_kv).to(gl.int64) * n_keys
        gl.atomic_add(dk + (lane_row + k_key)[:, None] * DK + c[None, :], dk_rows, mask=k_there[:, None], sem="relaxed")
        gl.atomic_add(dv + (lane_row + v_key)[:, None] * DV + e[None, :], dv_rows, mask=v_there[:, None], sem="relaxed")
