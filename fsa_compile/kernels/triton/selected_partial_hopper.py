"""The partial kernel of `selected_forward` for Hopper, in Gluon: the next tile's rows of Q arrive while a tile is computed.

    rows of Q of the first tile:  to shared memory
    for each tile of (query, head) rows of the item:
        wait for its rows;  start the copy of the next tile's
        S = Q K^T * scale * log2(e), masked;  m = max S;  P = exp2(S - m);  l = sum P
        O = P V / l, through the shared memory that Q has left, to the tile's slots;  m + log2(l)

Why not Triton's pipeline: see `selected_gradient_hopper`. Rows past an item's end repeat its last one and are not stored.
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

from .items import CHANGING
from .selected_gradient_hopper import barrier, copy_async, last_visible_block, load_work_item


@gluon.jit(do_not_specialize=list(CHANGING))
def partial_kernel(
    q, k, v, partial, partial_lse, order, item_starts, item_block, item_first, item_length, offsets,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_index_heads, lanes_per_kv,
    first_lane, begin_lane, slice_index, n_slices, slice_length, capacity, n_keys, n_blocks, offset, log2_scale,
    G: gl.constexpr, T: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, RULE: gl.constexpr, HAS_OFFSETS: gl.constexpr, MASKED: gl.constexpr,
    WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """See `selected_forward._partial_kernel`, whose arguments these are."""
    store = gl.program_id(0) // capacity
    item = gl.program_id(0) % capacity
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

    dtype: gl.constexpr = q.dtype.element_ty
    k_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [WARPS, 1], [1, 0])
    v_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [WARPS, 1], [1, 0])
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    q_base = q + batch * q_stride_b + (index_head * G).to(gl.int64) * q_stride_h
    q_base += (slice_index * slice_length).to(gl.int64) * q_stride_n
    entries = order + segment * slice_length * T + first
    partial += store.to(gl.int64) * slice_length * T * G * DV
    partial_lse += store.to(gl.int64) * slice_length * T * G

    k_smem = gl.allocate_shared_memory(dtype, [KEYS, DK], shared)
    v_smem = gl.allocate_shared_memory(dtype, [KEYS, DV], shared)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, DK], shared)
    c = gl.arange(0, DK, layout=gl.SliceLayout(0, k_rows))
    e = gl.arange(0, DV, layout=gl.SliceLayout(0, v_rows))
    q_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, k_rows))
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, v_rows))
    s_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, logits))
    q_pair = gl.load(entries + gl.minimum(q_row // G, length - 1))
    o_pair = gl.load(entries + gl.minimum(o_row // G, length - 1))
    s_pair = gl.load(entries + gl.minimum(s_row // G, length - 1))
    if WIDE:
        q_at = q_base + ((q_pair // T).to(gl.int64) * q_stride_n + (q_row % G).to(gl.int64) * q_stride_h)[:, None] + c[None, :]
    else:
        q_at = q_base + (q_pair // T * q_stride_n + q_row % G * q_stride_h)[:, None] + c[None, :]
    copy_async(q_smem.index(0), q_at)
    async_copy.commit_group()
    q_pair = gl.load(entries + gl.minimum(QUERIES + q_row // G, length - 1))

    k_key = block * BLOCK_SIZE + gl.arange(0, KEYS, layout=gl.SliceLayout(1, k_rows))
    v_key = block * BLOCK_SIZE + gl.arange(0, KEYS, layout=gl.SliceLayout(1, v_rows))
    key = block * BLOCK_SIZE + gl.arange(0, KEYS, layout=gl.SliceLayout(0, logits))
    k_at = k + batch * k_stride_b + kv_head * k_stride_h + k_key.to(gl.int64)[:, None] * k_stride_n + c[None, :]
    v_at = v + batch * v_stride_b + kv_head * v_stride_h + v_key.to(gl.int64)[:, None] * v_stride_n + e[None, :]
    k_smem.store(gl.load(k_at, mask=(k_key < n_keys)[:, None], other=0.0))
    v_smem.store(gl.load(v_at, mask=(v_key < n_keys)[:, None], other=0.0))

    turn = 0
    for done in range(0, length, QUERIES):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()  # all have seen the copy, and all have stored what the other half held
        if done + QUERIES < length:
            if WIDE:
                q_at = q_base + ((q_pair // T).to(gl.int64) * q_stride_n + (q_row % G).to(gl.int64) * q_stride_h)[:, None] + c[None, :]
            else:
                q_at = q_base + (q_pair // T * q_stride_n + q_row % G * q_stride_h)[:, None] + c[None, :]
            copy_async(q_smem.index(1 - turn), q_at)
            async_copy.commit_group()
        q_tile = q_smem.index(turn)
        s = warpgroup_mma(
            q_tile, k_smem.permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, logits), use_acc=False, is_async=True
        )
        o_slot, s_slot, local = o_pair * G + o_row % G, s_pair * G + s_row % G, s_pair // T
        q_pair = gl.load(entries + gl.minimum(done + 2 * QUERIES + q_row // G, length - 1))
        o_pair = gl.load(entries + gl.minimum(done + QUERIES + o_row // G, length - 1))
        s_pair = gl.load(entries + gl.minimum(done + QUERIES + s_row // G, length - 1))
        s = warpgroup_mma_wait(0, deps=[s]) * log2_scale
        if MASKED:
            last = last_visible_block(slice_index * slice_length + local + shift, block, n_keys, BLOCK_SIZE, RULE)
            s = gl.where(key[None, :] <= last[:, None], s, float("-inf"))
        m_i = gl.max(s, 1)
        if MASKED:
            m_i = gl.where(m_i == float("-inf"), 0.0, m_i)
        p = gl.exp2(s - m_i[:, None])
        l_i = gl.sum(p, 1)
        p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, sums, 2))
        acc = warpgroup_mma(p, v_smem, gl.zeros([ROWS, DV], gl.float32, sums), use_acc=False, is_async=True)
        l_safe = gl.where(l_i == 0.0, 1.0, l_i)
        inverse = gl.convert_layout(1.0 / l_safe, gl.SliceLayout(1, sums))
        lse_i = gl.where(l_i == 0.0, float("-inf"), m_i + gl.log2(l_safe))
        acc = (warpgroup_mma_wait(0, deps=[acc]) * inverse[:, None]).to(dtype)
        if DK == DV:
            q_tile.store(acc)
            o_rows = q_tile.load(v_rows)
        else:
            o_rows = gl.convert_layout(acc, v_rows)
        live = (o_row // G < QUERIES) & (done + o_row // G < length)
        o_at = partial + o_slot[:, None] * DV + e[None, :]  # read once, much later: rows of q stay in the cache instead
        gl.store(o_at, o_rows, mask=live[:, None], cache_modifier=".cs")
        live = (s_row // G < QUERIES) & (done + s_row // G < length)
        gl.store(partial_lse + s_slot, lse_i, mask=live)
        turn = 1 - turn
