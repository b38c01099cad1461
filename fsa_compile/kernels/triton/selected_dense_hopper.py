"""The dense kernel of `selected_dense` for Hopper, in Gluon: the next block arrives while a block is computed.

    for each block that many of the tile's queries list:
        wait for its K and V;  start the copy of the next block's
        S = Q K^T * scale * log2(e), masked by who lists the block and by the rule;  online softmax;  O += P V

Why not Triton's pipeline: see `selected_gradient_hopper`. Blocks are whole tiles of keys, and all of their keys exist.
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

from .selected_gradient_hopper import barrier, copy_async, last_visible_block


@gluon.jit(do_not_specialize=["first_lane", "n_queries", "n_keys", "tiles", "offset"])
def dense_kernel(
    q, k, v, out, lse, dense_count, dense_block, dense_members, offsets,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    o_stride_b, o_stride_h, o_stride_n, l_stride_b, l_stride_h,
    n_index_heads, lanes_per_kv, first_lane, n_queries, n_keys, tiles, offset, log2_scale,
    G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr,
    TILE_QUERIES: gl.constexpr, KEYS: gl.constexpr, CAPACITY: gl.constexpr, RULE: gl.constexpr, HAS_OFFSETS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """See `selected_dense._dense_kernel`, whose arguments these are."""
    PARTS: gl.constexpr = TILE_QUERIES // QUERIES
    STEPS: gl.constexpr = BLOCK_SIZE // KEYS
    part = gl.program_id(0) % PARTS
    tile = (gl.program_id(0) // PARTS) % tiles
    plan_lane = gl.program_id(0) // (PARTS * tiles)
    lane = first_lane + plan_lane
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
    q_smem = gl.allocate_shared_memory(dtype, [ROWS, DK], shared)
    k_smem = gl.allocate_shared_memory(dtype, [2, KEYS, DK], shared)
    v_smem = gl.allocate_shared_memory(dtype, [2, KEYS, DV], shared)

    c = gl.arange(0, DK, layout=gl.SliceLayout(0, k_rows))
    e = gl.arange(0, DV, layout=gl.SliceLayout(0, v_rows))
    k_row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, k_rows)).to(gl.int64)
    v_row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, v_rows)).to(gl.int64)
    k_base = k + batch * k_stride_b + kv_head * k_stride_h + (k_row * k_stride_n)[:, None] + c[None, :]
    v_base = v + batch * v_stride_b + kv_head * v_stride_h + (v_row * v_stride_n)[:, None] + e[None, :]
    listed = plan_lane * tiles + tile
    steps = gl.load(dense_count + listed) * STEPS
    blocks = dense_block + listed.to(gl.int64) * CAPACITY
    members = dense_members + listed.to(gl.int64) * CAPACITY
    block = gl.load(blocks, mask=steps > 0, other=0)
    word = gl.load(members, mask=steps > 0, other=0)
    if steps > 0:
        key = (block * BLOCK_SIZE).to(gl.int64)
        copy_async(k_smem.index(0), k_base + key * k_stride_n)
        copy_async(v_smem.index(0), v_base + key * v_stride_n)
        async_copy.commit_group()

    q_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, k_rows))
    query = tile * TILE_QUERIES + part * QUERIES + q_row // G
    live = (q_row < QUERIES * G) & (query < n_queries)
    q_at = q + batch * q_stride_b + (index_head * G + q_row % G).to(gl.int64) * q_stride_h + query.to(gl.int64) * q_stride_n
    q_smem.store(gl.load(q_at[:, None] + c[None, :], mask=live[:, None], other=0.0))

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, logits))
    of_tile = part * QUERIES + row // G
    query = tile * TILE_QUERIES + of_tile
    live = (row < QUERIES * G) & (query < n_queries)
    within = gl.arange(0, KEYS, layout=gl.SliceLayout(0, logits))
    m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, logits))
    l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, logits))
    acc = gl.zeros([ROWS, DV], gl.float32, sums)
    turn = 0
    for step in range(steps):
        ahead = gl.minimum(step + 1, steps - 1)
        next_block = gl.load(blocks + ahead // STEPS)
        next_word = gl.load(members + ahead // STEPS)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()  # all have seen the copy, and all are done with the other half
        if step + 1 < steps:
            key = (next_block * BLOCK_SIZE + ahead % STEPS * KEYS).to(gl.int64)
            copy_async(k_smem.index(1 - turn), k_base + key * k_stride_n)
            copy_async(v_smem.index(1 - turn), v_base + key * v_stride_n)
            async_copy.commit_group()
        s = warpgroup_mma(
            q_smem, k_smem.index(turn).permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, logits), use_acc=False, is_async=True
        )
        member = (word >> of_tile.to(word.dtype)) & 1
        last = last_visible_block(query + shift, block, n_keys, BLOCK_SIZE, RULE)
        last = gl.where(live & (member != 0), last, -1)
        s = warpgroup_mma_wait(0, deps=[s]) * log2_scale
        at = block * BLOCK_SIZE + step % STEPS * KEYS + within
        s = gl.where(at[None, :] <= last[:, None], s, float("-inf"))
        m_new = gl.maximum(m_i, gl.max(s, 1))
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m_i - m_safe)
        p = gl.exp2(s - m_safe[:, None])
        l_i = l_i * alpha + gl.sum(p, 1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, sums))[:, None]
        p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, sums, 2))
        acc = warpgroup_mma(p, v_smem.index(turn), acc, is_async=True)
        m_i = m_new
        acc = warpgroup_mma_wait(0, deps=[acc])
        block, word = next_block, next_word
        turn = 1 - turn

    l_safe = gl.where(l_i == 0.0, 1.0, l_i)
    total = gl.where(l_i == 0.0, float("-inf"), (m_i + gl.log2(l_safe)) * 0.6931471805599453)
    head = (index_head * G + row % G).to(gl.int64)
    gl.store(lse + batch * l_stride_b + head * l_stride_h + query, total, mask=live)
    acc = (acc * gl.convert_layout(1.0 / l_safe, gl.SliceLayout(1, sums))[:, None]).to(dtype)
    if DK == DV:
        q_smem.store(acc)
        rows = q_smem.load(v_rows)
    else:
        rows = gl.convert_layout(acc, v_rows)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, v_rows))
    query = tile * TILE_QUERIES + part * QUERIES + row // G
    live = (row < QUERIES * G) & (query < n_queries)
    o_at = out + batch * o_stride_b + (index_head * G + row % G).to(gl.int64) * o_stride_h + query.to(gl.int64) * o_stride_n
    gl.store(o_at[:, None] + e[None, :], rows, mask=live[:, None])
