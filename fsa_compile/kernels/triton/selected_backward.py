"""Backward of selected attention, key/value-block outer, one fused pass over the work items of all entries.

    delta = rowsum(dO * O) - dLSE                                         _delta_kernel
    for each work item (a block, some queries that list it):              _gradient_kernel, one program per tile of keys
        load K, V of the tile once;  dK = dV = 0 in float32
        for each tile of (query, head) rows of the item:
            p  = exp2(q k^T * scale * log2(e) - lse * log2(e)), masked
            dV += p^T dO;  ds = p * (dO v^T - delta);  dK += ds^T q
            store scale * ds k of each entry in the input dtype
        dK[tile] += scale * dK;  dV[tile] += dV
    for each (query, head): dQ = the sum of its entries                   _sum_entries_kernel, one program each

The rows of a tile run over all query heads that share an index list, so dK and dV of a group add up in float32. Across
programs they add up by relaxed float32 atomics. The deterministic variant stores them per work item in float32, and
_sum_items_kernel adds in a fixed order. dQ has a fixed order in either.

Sources: Flash Sparse Attention (arXiv 2508.18224) for the loop order, FlashAttention-2 (arXiv 2307.08691, algorithm 2) for
the recomputation. dLSE enters as d logit = p * (dP - rowsum(dO * O) + dLSE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import DKV_BYTES, GRADIENT_BYTES, PLAN_BYTES, PLAN_ENTRY_BYTES, WHOLE_BYTES, Launch, backward_launch
from .launch import device_of, power_of_two, slice_queries
from .launcher import fork, join, run
from .plan import Plan, Positions, build_plan, cut
from .items import CHANGING, LOG2E, last_visible, load_item, tile_mask
from .selected_gradient_hopper import gradient_kernel


@triton.jit(do_not_specialize=["n"])
def _delta_kernel(
    dout, out, dlse, delta, do_stride_b, do_stride_h, do_stride_n, o_stride_b, o_stride_h, o_stride_n,
    dl_stride_b, dl_stride_h, dl_stride_n, hq, n,
    DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, ROWS)
    query = ((tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    line = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = line // hq, line % hq
    e = tl.arange(0, DV_PAD)
    mask = tile_mask(query < n, e, DV, DV_PAD)
    o_row = batch * o_stride_b + head * o_stride_h + query * o_stride_n
    do_row = batch * do_stride_b + head * do_stride_h + query * do_stride_n
    o = tl.load(out + o_row[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(dout + do_row[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(o * do, 1)
    if HAS_DLSE:
        dl = dlse + batch * dl_stride_b + head * dl_stride_h + query * dl_stride_n
        total -= tl.load(dl, mask=query < n, other=0.0).to(tl.float32)
    tl.store(delta + line * n + query, total, mask=query < n)


@triton.jit(do_not_specialize=list(CHANGING))
def _gradient_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, order, item_starts, item_block, item_first, item_length, offsets,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    do_stride_b, do_stride_h, do_stride_n, l_stride_b, l_stride_h, d_stride_b, d_stride_h,
    n_index_heads, lanes_per_kv,
    first_lane, begin_lane, slice_index, n_slices, slice_length, capacity, n_keys, n_blocks, offset, scale, log2_scale, log2e,
    G: tl.constexpr, T: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, RULE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    DETERMINISTIC: tl.constexpr, WIDE: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    item = (tl.program_id(0) // PARTS) % capacity
    store = tl.program_id(0) // (PARTS * capacity)  # lane of dq, dk, dv; the plan starts at first_lane, they at begin_lane
    lane = begin_lane + store
    segment = (lane - first_lane).to(tl.int64) * n_slices + slice_index
    block, first, length = load_item(
        item_starts, item_block, item_first, item_length, segment, item, n_blocks, capacity
    )
    if length == 0:
        return
    batch = (lane // n_index_heads).to(tl.int64)
    index_head = lane % n_index_heads
    kv_head = (index_head // lanes_per_kv).to(tl.int64)
    if HAS_OFFSETS:
        shift = tl.load(offsets + batch).to(tl.int32)
    else:
        shift = offset
    entries = order + segment * slice_length * T + first

    row = tl.arange(0, ROWS)
    within = row // G
    g = row % G
    c = tl.arange(0, DK_PAD)
    e = tl.arange(0, DV_PAD)
    # Offsets inside a slice fit into 32 bits, except with huge strides.
    first_head = (index_head * G).to(tl.int64)
    first_query = (slice_index * slice_length).to(tl.int64)
    q_base = q + batch * q_stride_b + first_head * q_stride_h + first_query * q_stride_n
    do_base = dout + batch * do_stride_b + first_head * do_stride_h + first_query * do_stride_n
    lse_base = lse + batch * l_stride_b + first_head * l_stride_h + first_query
    delta_base = delta + batch * d_stride_b + first_head * d_stride_h + first_query
    dq_base = dq + store.to(tl.int64) * slice_length * (T * G * PARTS * DK) + part * DK
    local_key = part * KEYS + tl.arange(0, KEYS)
    key = block * BLOCK_SIZE + local_key
    there = (key < n_keys) & (local_key < BLOCK_SIZE)
    k_row = batch * k_stride_b + kv_head * k_stride_h + key.to(tl.int64) * k_stride_n
    v_row = batch * v_stride_b + kv_head * v_stride_h + key.to(tl.int64) * v_stride_n
    k_tile = tl.load(k + k_row[:, None] + c[None, :], mask=tile_mask(there, c, DK, DK_PAD), other=0.0)
    v_tile = tl.load(v + v_row[:, None] + e[None, :], mask=tile_mask(there, e, DV, DV_PAD), other=0.0)
    if TRANSPOSED:  # P and dS are then right-hand operands of wgmma, as they lie in shared memory
        dk_acc = tl.zeros((DK_PAD, KEYS), tl.float32)
        dv_acc = tl.zeros((DV_PAD, KEYS), tl.float32)
    else:
        dk_acc = tl.zeros((KEYS, DK_PAD), tl.float32)
        dv_acc = tl.zeros((KEYS, DV_PAD), tl.float32)
    for done in range(0, length, QUERIES):
        live = (within < QUERIES) & (done + within < length)
        pair = tl.load(entries + done + within, mask=live, other=0)
        if WIDE:
            pair = pair.to(tl.int64)
        local = pair // T
        q_row = local * q_stride_n + g * q_stride_h
        do_row = local * do_stride_n + g * do_stride_h
        q_tile = tl.load(q_base + q_row[:, None] + c[None, :], mask=tile_mask(live, c, DK, DK_PAD), other=0.0)
        do_tile = tl.load(do_base + do_row[:, None] + e[None, :], mask=tile_mask(live, e, DV, DV_PAD), other=0.0)
        lse_i = tl.load(lse_base + g * l_stride_h + local, mask=live, other=0.0) * log2e
        delta_i = tl.load(delta_base + g * d_stride_h + local, mask=live, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale
        query = slice_index * slice_length + local.to(tl.int32)
        last = tl.where(live, last_visible(query + shift, block, n_keys, BLOCK_SIZE, RULE), -1)
        p = tl.exp2(tl.where(key[None, :] <= last[:, None], s - lse_i[:, None], float("-inf")))
        if TRANSPOSED:
            dv_acc = tl.dot(tl.trans(do_tile), p.to(do_tile.dtype), dv_acc, input_precision="ieee")
        else:
            dv_acc = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_acc, input_precision="ieee")
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = (p * (dp - delta_i[:, None])).to(q_tile.dtype)
        if TRANSPOSED:
            dk_acc = tl.dot(tl.trans(q_tile), ds, dk_acc, input_precision="ieee")
        else:
            dk_acc = tl.dot(tl.trans(ds), q_tile, dk_acc, input_precision="ieee")
        dq_tile = tl.dot(ds, k_tile, input_precision="ieee") * scale
        slot = (pair * G + g) * (PARTS * DK)  # dq is (lanes, slice_length * T, G, PARTS, dk)
        tl.store(dq_base + slot[:, None] + c[None, :], dq_tile.to(dq.dtype.element_ty), mask=tile_mask(live, c, DK, DK_PAD))
    dk_acc *= scale
    if TRANSPOSED:
        dk_acc = tl.trans(dk_acc)
        dv_acc = tl.trans(dv_acc)
    if DETERMINISTIC:  # dk and dv are (lanes, capacity, block_size, d)
        d_row = (store.to(tl.int64) * capacity + item) * BLOCK_SIZE + local_key
        tl.store(dk + d_row[:, None] * DK + c[None, :], dk_acc, mask=tile_mask(there, c, DK, DK_PAD))
        tl.store(dv + d_row[:, None] * DV + e[None, :], dv_acc, mask=tile_mask(there, e, DV, DV_PAD))
    else:  # dk and dv are (lanes / lanes_per_kv, m, d)
        d_row = (store // lanes_per_kv).to(tl.int64) * n_keys + key
        tl.atomic_add(dk + d_row[:, None] * DK + c[None, :], dk_acc, mask=tile_mask(there, c, DK, DK_PAD), sem="relaxed")
        tl.atomic_add(dv + d_row[:, None] * DV + e[None, :], dv_acc, mask=tile_mask(there, e, DV, DV_PAD), sem="relaxed")


@triton.jit(do_not_specialize=["first_lane", "begin_lane", "slice_index", "n_slices", "slice_length", "n_queries"])
def _sum_entries_kernel(
    partial, kept, dq, q_stride_b, q_stride_h, q_stride_n, n_index_heads,
    first_lane, begin_lane, slice_index, n_slices, slice_length, n_queries,
    G: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, DK: tl.constexpr, DK_PAD: tl.constexpr, TILE: tl.constexpr,
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
    c = tl.arange(0, DK_PAD)
    acc = tl.zeros((DK_PAD,), tl.float32)
    for begin in range(0, T * PARTS, TILE):
        at = begin + tl.arange(0, TILE)
        some = tl.load(blocks + at // PARTS, mask=at < T * PARTS, other=-1) >= 0
        slot = ((slots + at // PARTS) * G + g) * PARTS + at % PARTS
        tile = tl.load(partial + slot[:, None] * DK + c[None, :], mask=tile_mask(some, c, DK, DK_PAD), other=0.0)
        acc += tl.sum(tile.to(tl.float32), 0)
    row = dq + batch * q_stride_b + head * q_stride_h + query * q_stride_n
    tl.store(row + c, acc.to(dq.dtype.element_ty), mask=c < DK)


@triton.jit(do_not_specialize=["skipped_lanes", "slice_index", "n_slices", "capacity", "n_keys", "n_blocks"])
def _sum_items_kernel(
    partial, item_starts, total, skipped_lanes, slice_index, n_slices, capacity, n_keys, n_blocks, lanes_per_kv,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    block = (tl.program_id(0) // PARTS) % n_blocks
    kv = (tl.program_id(0) // (PARTS * n_blocks)).to(tl.int64)
    local_key = part * KEYS + tl.arange(0, KEYS)
    key = block * BLOCK_SIZE + local_key
    c = tl.arange(0, D_PAD)
    mask = tile_mask((key < n_keys) & (local_key < BLOCK_SIZE), c, D, D_PAD)
    target = total + (kv * n_keys + key)[:, None] * D + c[None, :]
    acc = tl.load(target, mask=mask, other=0.0)
    for lane in range(kv * lanes_per_kv, (kv + 1) * lanes_per_kv):
        at = ((skipped_lanes + lane) * n_slices + slice_index) * (n_blocks + 1) + block
        for item in range(tl.load(item_starts + at), tl.load(item_starts + at + 1)):
            row = (lane * capacity + item) * BLOCK_SIZE + local_key
            acc += tl.load(partial + row[:, None] * D + c[None, :], mask=mask, other=0.0)
    tl.store(target, acc, mask=mask)


@dataclass(frozen=True)
class _Problem:
    """What every launch of one backward needs; shapes as in `selected_attention_backward`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    indices: torch.Tensor
    block_size: int
    scale: float
    rule: str
    positions: Positions
    launch: Launch

    @property
    def group(self) -> int:
        """Query heads that share an index list."""
        return self.q.shape[1] // self.indices.shape[1]

    @property
    def lists(self) -> int:
        """Index lists that share a key/value head."""
        return self.indices.shape[1] // self.k.shape[1]

    @property
    def lanes(self) -> range:
        """All lanes."""
        return range(self.q.shape[0] * self.indices.shape[1])

    @property
    def parts(self) -> int:
        """Tiles of keys in a block."""
        return -(-self.block_size // self.launch.keys)

    def plan(self, lanes: range, slice_length: int, item_queries: int, stable: bool) -> Plan:
        """The work items of some lanes."""
        m, at = self.k.shape[2], self.positions
        return build_plan(
            self.indices, lanes, m, self.block_size, self.rule, at, slice_length, item_queries, self.launch.queries, stable
        )


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    block_size: int,
    scale: float,
    rule: str,
    positions: Positions,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of selected attention, some lanes and one slice of queries at a time; see `selected_attention_backward`."""
    (b, hq, n, dk), (_, _, m, dv), (_, hi, _, t) = q.shape, v.shape, indices.shape
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if 0 in (b, hq, n, m, t):
        return tuple(g.zero_() for g in grads)
    launch = backward_launch(hq // hi, block_size, dk, dv, q.dtype, device_of(q))
    delta = row_delta(dout, out, dlse)
    problem = _Problem(q, k, v, dout, lse, delta, indices, block_size, scale, rule, positions, launch)
    (_deterministic if deterministic else _atomic)(problem, *grads)
    return grads


def row_delta(dout: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """(b, hq, n) float32: rowsum(dout * out) - dlse."""
    b, hq, n, dv = out.shape
    delta = torch.empty((b, hq, n), dtype=torch.float32, device=out.device)
    dv_pad = power_of_two(dv, 16)
    rows = max(1, min(power_of_two(n), 4096 // dv_pad))
    run(
        _delta_kernel, b * hq * -(-n // rows), (dout, out, delta if dlse is None else dlse, delta),
        (*dout.stride()[:3], *out.stride()[:3], *(delta if dlse is None else dlse).stride(), hq), (n,),
        dict(DV=dv, DV_PAD=dv_pad, ROWS=rows, HAS_DLSE=dlse is not None),
    )  # fmt: skip
    return delta


def _atomic(problem: _Problem, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """dK and dV by float32 atomics."""
    p = problem
    (_, _, n, d), (_, _, m, e), t = p.q.shape, p.v.shape, p.indices.shape[3]
    lists, kv_lane_bytes = p.lists, -(-m * (d + e) * 4 // p.lists)
    query_bytes = p.group * t * p.parts * d * dq.element_size()
    budget = WHOLE_BYTES if len(p.lanes) * n * query_bytes <= WHOLE_BYTES else GRADIENT_BYTES // 2
    # Lanes of one key/value head go together or one by one.
    multiple = lists if n * query_bytes * lists <= budget else 1
    together = len(next(cut(p.lanes, n * query_bytes, budget, multiple)))
    slice_length = slice_queries(n, together * query_bytes, budget)
    alone = together == len(p.lanes) and slice_length == n
    shape = (together, slice_length * t, p.group, p.parts, d)
    buffers = [torch.empty(shape, dtype=dq.dtype, device=dq.device) for _ in range(1 if alone else 2)]
    heads = len(next(cut(p.lanes, kv_lane_bytes, DKV_BYTES, lists))) // lists
    dk_sum, dv_sum = (torch.empty((heads, m, x), dtype=torch.float32, device=dq.device) for x in (d, e))
    turn = 0
    for planned in cut(p.lanes, n * t * PLAN_ENTRY_BYTES, PLAN_BYTES, lists):
        plan = p.plan(planned, slice_length, p.launch.item_queries, stable=False)
        for of_heads in cut(planned, kv_lane_bytes, DKV_BYTES, lists):
            dk_sum.zero_()
            dv_sum.zero_()
            streams = (None,) if alone else (None, fork(dq))
            for lanes in cut(of_heads, n * query_bytes, budget, multiple):
                head = (lanes.start - of_heads.start) // lists
                for index in range(plan.slices):
                    buffer, stream = buffers[turn % len(buffers)], streams[turn % len(streams)]
                    launch_gradient(p, plan, lanes, index, buffer, dk_sum[head:], dv_sum[head:], False, stream)
                    launch_sum_entries(p, plan, lanes, index, buffer, dq, stream)
                    turn += 1
            join(streams[-1])
            _store_kv(p, of_heads, dk, dk_sum)
            _store_kv(p, of_heads, dv, dv_sum)


def _deterministic(problem: _Problem, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """The same sums in a fixed order: what atomics would add is stored per entry and per work item, then added."""
    p = problem
    (_, _, n, d), (_, _, m, e), t = p.q.shape, p.v.shape, p.indices.shape[3]
    group, lists, parts, blocks, device = p.group, p.lists, p.parts, -(-m // p.block_size), dq.device
    # Items are as long as a block's average list: then there are at most twice as many as blocks, and each costs
    # block_size * (d + e) floats. The sums they go into cost as much again for each key/value head.
    lane_bytes = m * (d + e) * 4 * 3
    together = len(next(cut(p.lanes, lane_bytes, DKV_BYTES, lists)))
    slice_length = slice_queries(n, together * group * t * parts * d * dq.element_size(), GRADIENT_BYTES // 2)
    item_queries = power_of_two(-(-slice_length * t // (blocks * p.launch.queries))) * p.launch.queries
    dq_entry = torch.empty((together, slice_length * t, group, parts, d), dtype=dq.dtype, device=device)
    dk_sum, dv_sum = (torch.empty((together // lists, m, x), dtype=torch.float32, device=device) for x in (d, e))
    dk_item, dv_item = (
        torch.empty((together, slice_length * t // item_queries + blocks, p.block_size, x), dtype=torch.float32, device=device)
        for x in (d, e)
    )
    for planned in cut(p.lanes, n * t * PLAN_ENTRY_BYTES, PLAN_BYTES, lists):
        plan = p.plan(planned, slice_length, item_queries, stable=True)
        for lanes in cut(planned, lane_bytes, DKV_BYTES, lists):
            dk_sum.zero_()
            dv_sum.zero_()
            for index in range(plan.slices):
                launch_gradient(p, plan, lanes, index, dq_entry, dk_item, dv_item, deterministic=True)
                launch_sum_entries(p, plan, lanes, index, dq_entry, dq)
                for item, total in ((dk_item, dk_sum), (dv_item, dv_sum)):
                    _sum_items_kernel[(len(lanes) // lists * blocks * parts,)](
                        item, plan.item_starts, total, lanes.start - planned.start, index, plan.slices, plan.capacity, m,
                        blocks, lists, D=total.shape[-1], D_PAD=power_of_two(total.shape[-1], 16),
                        BLOCK_SIZE=p.block_size, KEYS=p.launch.keys, PARTS=parts,
                    )  # fmt: skip
            _store_kv(p, lanes, dk, dk_sum)
            _store_kv(p, lanes, dv, dv_sum)


def _store_kv(problem: _Problem, lanes: range, grad: torch.Tensor, total: torch.Tensor) -> None:
    """Round the float32 sums of the key/value heads of `lanes` into the gradient (b, hkv, m, d)."""
    here = grad.flatten(0, 1)[lanes.start // problem.lists : lanes.stop // problem.lists]
    here.copy_(total[: here.shape[0]])


def launch_gradient(
    problem: _Problem,
    plan: Plan,
    lanes: range,
    index: int,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    deterministic: bool,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Run the work items of slice `index` into `dq`, `dk` and `dv`, whose layouts the kernel's comments give."""
    p, q, k, v, dout, launch = problem, problem.q, problem.k, problem.v, problem.dout, problem.launch
    (_, _, _, d), (_, hkv, m, e), hi, offsets = q.shape, v.shape, p.indices.shape[1], p.positions.offsets
    furthest = max(
        *(plan.slice_length * x.stride(2) + p.group * x.stride(1) for x in (q, dout)),
        plan.slice_length * plan.kept.shape[-1] * p.group * p.parts * d,
    )
    programs = len(lanes) * plan.capacity * p.parts
    tensors = (
        q, k, v, dout, p.lse, p.delta, dq, dk, dv, plan.order, plan.item_starts, plan.item_block, plan.item_first,
        plan.item_length, plan.order if offsets is None else offsets,
    )  # fmt: skip
    fixed = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *p.lse.stride()[:2], *p.delta.stride()[:2], hi, hi // hkv,
    )  # fmt: skip
    varying = (
        plan.lanes.start, lanes.start, index, plan.slices, plan.slice_length, plan.capacity, m, plan.blocks, p.positions.offset,
        p.scale, p.scale * LOG2E, LOG2E,
    )  # fmt: skip
    shared = dict(
        G=p.group, T=plan.kept.shape[-1], DK=d, DV=e, BLOCK_SIZE=p.block_size, ROWS=launch.rows, QUERIES=launch.queries,
        KEYS=launch.keys, PARTS=p.parts, RULE=p.rule, HAS_OFFSETS=offsets is not None, DETERMINISTIC=deterministic,
        WIDE=furthest >= 2**31,
    )  # fmt: skip
    if launch.hopper and all(stride % 16 == 0 for x in (q, k, v, dout) for stride in x.stride()[:3]):
        constants = {**shared, "WARPS": launch.warps}
        run(gradient_kernel, programs, tensors, fixed, varying, constants, stream, num_warps=launch.warps)
        return
    padded = {**shared, "DK_PAD": power_of_two(d, 16), "DV_PAD": power_of_two(e, 16), "TRANSPOSED": launch.transposed}
    run(
        _gradient_kernel, programs, tensors, fixed, varying, padded, stream,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip


def launch_sum_entries(
    problem: _Problem,
    plan: Plan,
    lanes: range,
    index: int,
    entries: torch.Tensor,
    dq: torch.Tensor,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Add up slice `index` of dQ (b, hq, n, dk) from `entries`, (lanes, slice_length * t, g, parts, dk)."""
    (_, hq, n, d), t, group, parts = dq.shape, plan.kept.shape[-1], problem.group, problem.parts
    queries, d_pad = min(plan.slice_length, n - index * plan.slice_length), power_of_two(d, 16)
    run(
        _sum_entries_kernel, len(lanes) * queries * group, (entries, plan.kept, dq), (*dq.stride()[:3], hq // group),
        (plan.lanes.start, lanes.start, index, plan.slices, plan.slice_length, queries),
        dict(G=group, T=t, PARTS=parts, DK=d, DK_PAD=d_pad, TILE=min(power_of_two(t * parts), max(1, 4096 // d_pad))),
        stream, num_warps=1,
    )  # fmt: skip
