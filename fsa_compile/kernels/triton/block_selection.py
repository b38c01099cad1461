"""Choosing blocks on a GPU: entry points and the kernel. Scores never exist as a whole.

    for each tile of queries of a list head, as many programs as the device holds at once:     _selection_kernel
        for each section of 1024 blocks:
            scores of the tile's queries into the program's own scratch rows                    `block_scores`
            their best blocks, straight after                                                  `block_lists`
        more than one section: the best of the sections' best

The scratch is that of the programs that run at a time and stays in the L2 cache; it does not grow with the sequence. Later tiles
see more keys and start first. What is computed: `reference.select_blocks` and `reference.select_blocks_by_max`; nothing waits
for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .alignment import align
from .bands import BandRule, band_stop, query_shift
from .block_lists import WORDS, forced_blocks, list_blocks, rank_blocks
from .block_scores import score_by_max, score_by_sum
from .items import tile_mask
from .launch import Device, current_device, device_of, power_of_two
from .selected_attention import DTYPES, MOST_HEAD_DIM
from .selected_forward import LOG2E

SECTION = 1024
"""Blocks whose scores a program keeps at once."""
CANDIDATES = 1024
"""Most candidates that the sections of a query may leave for the last round."""
PROGRAMS = 2
"""Programs per multiprocessor."""


@dataclass(frozen=True)
class SelectionLaunch:
    """How the kernel runs.

    Args:
        queries: Queries of a tile.
        heads: Query heads of a tile, filled up to a power of two.
        keys: Keys of a tile, whole blocks of them.
        high: The part of a key's place in its block that its row's highest bits hold (see `block_scores`).
        low_blocks: Blocks that the row's lowest bits count.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    queries: int
    heads: int
    keys: int
    high: int
    low_blocks: int
    warps: int
    stages: int


def selection_launch(heads: int, per_block: int, d: int, dtype: torch.dtype, device: Device) -> SelectionLaunch:
    """The kernel's parameters for lists shared by `heads` query heads and blocks of `per_block` keys."""
    heads = power_of_two(heads)
    rows, keys, stages = (128, 128, 2) if dtype.itemsize == 2 else (32, 32, 1)
    rows, keys, d = max(rows, heads), max(keys, per_block), power_of_two(d, 16)
    while shared_memory(rows, keys, d, dtype.itemsize, stages) > device.shared_memory and stages > 1:
        stages -= 1
    while shared_memory(rows, keys, d, dtype.itemsize, stages) > device.shared_memory and keys > max(16, per_block):
        keys //= 2
    while shared_memory(rows, keys, d, dtype.itemsize, stages) > device.shared_memory and rows > max(16, heads):
        rows //= 2
    blocks = keys // per_block
    return SelectionLaunch(rows // heads, heads, keys, 2 if keys >= 128 and per_block > 1 else 1, min(8, blocks), 4, stages)


def shared_memory(rows: int, keys: int, d: int, itemsize: int, stages: int) -> int:
    """Upper bound in bytes: Q, `stages` copies of K, scores between layouts."""
    return itemsize * d * (rows + stages * keys) + 4 * rows * keys


@triton.jit(
    do_not_specialize=[
        "n_queries", "n_keys", "n_blocks", "stride", "last", "prefix", "offset", "kernel_size", "block_size", "top_k", "n_init",
        "n_local",
    ]
)  # fmt: skip
def _selection_kernel(
    q, k, lse, out, scratch, notes, offsets, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
    n_queries, n_keys, n_blocks, stride, last, prefix, offset, kernel_size, block_size, top_k, n_init, n_local, log2_scale,
    lines, lists, group, kv_group,
    D: tl.constexpr, D_PAD: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr,
    HIGH: tl.constexpr, BLOCKS_LOW: tl.constexpr, SLOTS: tl.constexpr, REACHES: tl.constexpr, SIGNED: tl.constexpr,
    SECTION: tl.constexpr, SECTIONS: tl.constexpr, ELEMENTS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * QUERIES
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    FAR: tl.constexpr = SECTION + 16
    near = scratch + tl.program_id(0).to(tl.int64) * (QUERIES * (SECTION + FAR if REACHES else SECTION))
    far = near + QUERIES * SECTION
    words = notes + tl.program_id(0).to(tl.int64) * (QUERIES * (WORDS + 2 * SECTIONS * SLOTS))
    candidate = words + QUERIES * WORDS
    candidate_key = candidate + QUERIES * SECTIONS * SLOTS
    tiles = tl.cdiv(n_queries, QUERIES)
    c = tl.arange(0, D_PAD)
    i = tl.arange(0, ROWS)
    for work in range(tl.program_id(0), tiles * lines, tl.num_programs(0)):
        first_query = (tiles - 1 - work // lines) * QUERIES
        line = (work % lines).to(tl.int64)
        batch, list_head = line // lists, line % lists
        shift = query_shift(offsets, batch, offset, HAS_OFFSETS)
        back = tl.minimum(first_query + QUERIES, n_queries) - 1 + shift
        end = tl.minimum(tl.where(back >= 0, tl.maximum(back, 0) // block_size + 1, 0), n_blocks)

        query = first_query + i % QUERIES
        live = (query < n_queries) & (i // QUERIES < group)
        head = list_head * group + i // QUERIES
        wide = query.to(tl.int64)
        at = q + batch * q_stride_b + head * q_stride_h + wide * q_stride_n
        q_tile = tl.load(at[:, None] + c[None, :], mask=tile_mask(live, c, D, D_PAD), other=0.0)
        k_base = k + batch * k_stride_b + list_head // kv_group * k_stride_h
        stop = band_stop(query + shift, stride, last, prefix, n_keys)
        whole = tl.maximum(band_stop(first_query + shift, stride, last, prefix, n_keys) - prefix, 0) // KEYS * BLOCKS
        if not SIGNED:
            lse_row = tl.load(lse + (batch * lists * group + head) * n_queries + wide, mask=live, other=float("-inf"))
            # exp2(x - inf) = 0: heads and queries that fill up the tile, and rows without keys, have no weight anywhere
            lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row * 1.4426950408889634)
        # The number of forced blocks grows, stays and, behind the last key, falls: it is least at one of the ends.
        a, b, c_front = forced_blocks(first_query + shift, n_blocks, block_size, n_init, n_local)
        d, e, c_back = forced_blocks(back, n_blocks, block_size, n_init, n_local)
        rounds = top_k - tl.minimum(a + c_front - b, d + c_back - e)
        for section in range(0, tl.maximum(tl.cdiv(end, SECTION), 1)):
            begin = section * SECTION
            if REACHES:  # into a section's first block reaches the last one of the section before; into the very first, none
                row = tl.arange(0, QUERIES) * FAR
                carried = tl.load(far + row + SECTION, mask=(row >= 0) & (section > 0), other=0.0)
                tl.store(far + row, carried)
                tl.debug_barrier()
            until = tl.minimum(begin + SECTION, tl.cdiv(end, BLOCKS) * BLOCKS)
            middle = tl.minimum(tl.maximum(whole, begin), until)
            if SIGNED:
                score_by_max(
                    near, SECTION, q_tile, stop, k_base, k_stride_n, begin, begin, middle, n_keys,
                    D, D_PAD, QUERIES, KEYS, PER_BLOCK, False,
                )  # fmt: skip
                score_by_max(
                    near, SECTION, q_tile, stop, k_base, k_stride_n, begin, middle, until, n_keys,
                    D, D_PAD, QUERIES, KEYS, PER_BLOCK, True,
                )  # fmt: skip
            else:
                score_by_sum(
                    near, far, SECTION, FAR, q_tile, lse_row, stop, k_base, k_stride_n, begin, begin, middle, prefix, stride,
                    kernel_size, block_size, log2_scale, n_keys,
                    D, D_PAD, HEADS, QUERIES, KEYS, PER_BLOCK, HIGH, BLOCKS_LOW, REACHES, False,
                )  # fmt: skip
                score_by_sum(
                    near, far, SECTION, FAR, q_tile, lse_row, stop, k_base, k_stride_n, begin, middle, until, prefix, stride,
                    kernel_size, block_size, log2_scale, n_keys,
                    D, D_PAD, HEADS, QUERIES, KEYS, PER_BLOCK, HIGH, BLOCKS_LOW, REACHES, True,
                )  # fmt: skip
            tl.debug_barrier()  # the scores are in memory: now rows of them are read
            width = tl.minimum(end - begin, SECTION)
            if width <= 128:
                rank_blocks(
                    near, far, SECTION, FAR, words, candidate, candidate_key, first_query, n_queries, shift, begin, begin + width,
                    rounds, n_blocks, block_size, top_k, n_init, n_local,
                    QUERIES, 128, SLOTS, REACHES, SIGNED, SECTIONS, False, ELEMENTS,
                )  # fmt: skip
            elif width <= 256:
                rank_blocks(
                    near, far, SECTION, FAR, words, candidate, candidate_key, first_query, n_queries, shift, begin, begin + width,
                    rounds, n_blocks, block_size, top_k, n_init, n_local,
                    QUERIES, 256, SLOTS, REACHES, SIGNED, SECTIONS, False, ELEMENTS,
                )  # fmt: skip
            elif width <= 512:
                rank_blocks(
                    near, far, SECTION, FAR, words, candidate, candidate_key, first_query, n_queries, shift, begin, begin + width,
                    rounds, n_blocks, block_size, top_k, n_init, n_local,
                    QUERIES, 512, SLOTS, REACHES, SIGNED, SECTIONS, False, ELEMENTS,
                )  # fmt: skip
            else:
                rank_blocks(
                    near, far, SECTION, FAR, words, candidate, candidate_key, first_query, n_queries, shift, begin, begin + width,
                    rounds, n_blocks, block_size, top_k, n_init, n_local,
                    QUERIES, 1024, SLOTS, REACHES, SIGNED, SECTIONS, False, ELEMENTS,
                )  # fmt: skip
            tl.debug_barrier()
            list_blocks(
                near, far, SECTION, FAR, words, out, candidate, candidate_key, first_query, n_queries, begin, width, section,
                line, top_k, QUERIES, SLOTS, REACHES, SIGNED, SECTIONS, False,
            )  # fmt: skip
            tl.debug_barrier()
        if SECTIONS > 1:
            width = tl.maximum(tl.cdiv(end, SECTION), 1) * SLOTS
            rank_blocks(
                near, far, SECTION, FAR, words, candidate, candidate_key, first_query, n_queries, shift, 0, width,
                rounds, n_blocks, block_size, top_k, n_init, n_local,
                QUERIES, SECTIONS * SLOTS, SLOTS, REACHES, SIGNED, SECTIONS, True, ELEMENTS,
            )  # fmt: skip
            tl.debug_barrier()
            list_blocks(
                near, far, SECTION, FAR, words, out, candidate, candidate_key, first_query, n_queries, 0, width, 0,
                line, top_k, QUERIES, SLOTS, REACHES, SIGNED, SECTIONS, True,
            )  # fmt: skip
            tl.debug_barrier()


def select_blocks_supports(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int,
    kernel_size: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int,
    q_offsets: torch.Tensor | None,
) -> str | None:
    """Why the kernel does not take the arguments of `select_blocks`: one sentence, or None if it does."""
    if block_size % stride:
        return f"the block size {block_size} must be a multiple of the stride {stride}."
    if kernel_size > block_size + stride:
        return f"a key of {kernel_size} tokens reaches into more than two blocks of {block_size}."
    heads = q.shape[1] // max(1, k_cmp.shape[1])
    return _refuse(q, k_cmp, heads, block_size // stride, -(-n_keys // block_size), top_k, n_init, n_local)


def select_blocks_by_max_supports(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int,
    q_offsets: torch.Tensor | None,
) -> str | None:
    """Why the kernel does not take the arguments of `select_blocks_by_max`: one sentence, or None if it does."""
    return _refuse(q, k, 1, block_size, -(-k.shape[2] // block_size), top_k, n_init, n_local)


def _refuse(
    q: torch.Tensor, k: torch.Tensor, heads: int, per_block: int, blocks: int, top_k: int, n_init: int, n_local: int
) -> str | None:
    if q.dtype != k.dtype or q.dtype not in DTYPES:
        return f"q and k must share one dtype of float16, bfloat16 and float32, not {q.dtype} and {k.dtype}."
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"the head dimension {q.shape[-1]} must be at most {MOST_HEAD_DIM}."
    if heads > 128:
        return f"a list is shared by {heads} query heads, a tile holds 128."
    if per_block > 128 or per_block != power_of_two(per_block):
        return f"a block of {per_block} keys must be a power of two up to 128."
    if n_init + n_local > top_k:
        return f"{n_init + n_local} forced blocks must fit into {top_k}."
    if _sections(blocks) * power_of_two(top_k, 16) > CANDIDATES and _sections(blocks) > 1:
        return f"{top_k} of {blocks} blocks are too many for the rounds of a program."
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0."
    device = device_of(q)
    launch = selection_launch(heads, per_block, q.shape[-1], q.dtype, device)
    needed = shared_memory(
        launch.queries * launch.heads, launch.keys, power_of_two(q.shape[-1], 16), q.element_size(), launch.stages
    )
    if needed > device.shared_memory:
        return f"a tile needs {needed} bytes of shared memory, the device has {device.shared_memory}."
    return None


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    stride: int,
    last: int,
    prefix: int,
    kernel_size: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int,
    q_offsets: torch.Tensor | None,
) -> torch.Tensor:
    """`reference.select_blocks`: indices (b, hkv, n, top_k) int32.

    Raises:
        ValueError: for arguments that `select_blocks_supports` refuses.
    """
    forced = top_k, n_init, n_local
    why = select_blocks_supports(
        q, k_cmp, lse, scale, stride, last, prefix, kernel_size, block_size, n_keys, *forced, q_offset, q_offsets
    )
    if why is not None:
        raise ValueError(f"block selection: {why}")
    rule = BandRule(stride=stride, last=last, prefix=prefix, q_offset=q_offset, q_offsets=q_offsets)
    return _launch(q, k_cmp, lse.to(torch.float32).contiguous(), scale, rule, kernel_size, block_size, n_keys, *forced, k_cmp.shape[1])


def select_blocks_by_max(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    top_k: int,
    n_init: int,
    n_local: int,
    q_offset: int,
    q_offsets: torch.Tensor | None,
) -> torch.Tensor:
    """`reference.select_blocks_by_max`: indices (b, hq, n, top_k) int32.

    Raises:
        ValueError: for arguments that `select_blocks_by_max_supports` refuses.
    """
    why = select_blocks_by_max_supports(q, k, block_size, top_k, n_init, n_local, q_offset, q_offsets)
    if why is not None:
        raise ValueError(f"block selection: {why}")
    rule = BandRule(q_offset=q_offset, q_offsets=q_offsets)
    return _launch(q, k, None, 1.0, rule, 1, block_size, k.shape[2], top_k, n_init, n_local, q.shape[1])


def _sections(blocks: int) -> int:
    return power_of_two(-(-blocks // SECTION))


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    rule: BandRule,
    kernel_size: int,
    block_size: int,
    n_keys: int,
    top_k: int,
    n_init: int,
    n_local: int,
    lists: int,
) -> torch.Tensor:
    """Indices (b, lists, n, top_k): by probability with an lse, by the largest logit without."""
    (b, hq, n, _), (hkv, c) = q.shape, k.shape[1:3]
    out = torch.empty((b, lists, n, top_k), dtype=torch.int32, device=q.device)
    if 0 in (b, lists, n):
        return out
    if c == 0:  # no key, no score; the kernel still wants an address to read from
        k = k.new_zeros(b, hkv, 1, k.shape[-1])
    q, k = align(q), align(k)
    d, per_block, blocks = q.shape[-1], block_size // rule.stride, -(-n_keys // block_size)
    launch = selection_launch(hq // lists, per_block, d, q.dtype, device_of(q))
    lines = b * lists
    programs = min(-(-n // launch.queries) * lines, PROGRAMS * _multiprocessors(q))
    reaches, sections, slots = kernel_size > rule.stride, _sections(blocks), power_of_two(top_k, 16)
    row = 2 * SECTION + 16 if reaches else SECTION
    scratch = torch.empty(programs * launch.queries * row, dtype=torch.float32, device=q.device)
    notes = torch.empty(programs * launch.queries * (WORDS.value + 2 * sections * slots), dtype=torch.int32, device=q.device)
    _, stride, last, prefix, offset = rule.arguments
    with current_device(q):
        _selection_kernel[(programs,)](
            q, k, scratch if lse is None else lse, out, scratch, notes, out if rule.q_offsets is None else rule.q_offsets,
            *q.stride()[:3], *k.stride()[:3], n, c, blocks, stride, last, prefix, offset, kernel_size, block_size,
            top_k, n_init, n_local, scale * LOG2E, lines, lists, hq // lists, lists // hkv,
            D=d, D_PAD=power_of_two(d, 16), HEADS=launch.heads, QUERIES=launch.queries, KEYS=launch.keys, PER_BLOCK=per_block,
            HIGH=launch.high, BLOCKS_LOW=launch.low_blocks, SLOTS=slots, REACHES=reaches, SIGNED=lse is None,
            SECTION=SECTION, SECTIONS=sections, ELEMENTS=1024 * launch.warps, HAS_OFFSETS=rule.q_offsets is not None,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return out


def _multiprocessors(x: torch.Tensor) -> int:
    """Of the GPU that holds `x`; 2 where there is none, so that interpreted programs take several tiles."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 2
