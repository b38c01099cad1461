"""Models of public repositories: imported from a clone, built through their own constructors, never copied.

A clone lies in the directory of ``--repos`` as ``owner+name``, ``owner/name`` or ``name``, at the commit given here. What a
module imports, this machine lacks and the attention does not need (compiled extensions, plotting, ray) is stood in for.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .trial import Case, NotRun, block_mask, picks, randomise, randoms

REPOSITORIES: Mapping[str, str] = {
    "MoonshotAI/MoBA": "61e456bc956c5a25fd9c84e5496b661329cb1b72",
    "XunhaoLai/native-sparse-attention-triton": "9bea856c911ebf263be88d797fb28458f82f1d94",
    "YentlCollin/native-sparse-attention": "2e983f2761c1326d8e6f2edffea6f99cde9a57a5",
    "gaspardbd/NativeSparseAttention": "8c3aef6a596d9d19ca6638ce82ffc18f28342ef3",
    "HazyResearch/zoology": "d88d6f5474f36998d82d5c3bd58a190248d0a669",
    "mit-han-lab/flash-moba": "39d9ac043b271d046a2181a9991e99a26b67bca1",
    "OpenBMB/infllmv2_cuda_impl": "f908e7316da706ed36c3dcfaaec6489ba4c03007",
    "skylight-org/sparse-attention-hub": "f5abf91759c32f8eee66f0be6bd9d90b850b6c8e",
    "tile-ai/tilelang": "a35008a42531c62b976ae4cec3855d4383db0f3c",
    "ZeroAGI/NSA-pytorch": "bcd465150037f8b4d5fdc8c2add6c6c2987bf13b",
    "yacine-baghli/minilm-bench": "76d6a4eaccfe04f1f4704610857b65ed37d416f4",
    "aman-17/911": "50eb33127419dd6accccfa05f82ee0c4c2efef81",
    "artyomche9/NSA-Torch": "190b1cb1ac7e6c62079d7e938c82b87c7d62cce2",
    "sparse-attention-span/Select2Win": "6c263551c9fbafd06ca0408d9f964f53d9c1e6a6",
    "Lulzx/subquadratic-sparse-attention": "6bccae30cb61febc2e96dd8c6d9b6bfca0e0d385",
}
"""The commit at which each repository was read and its rows of ``expected.md`` were written."""


def clone(repos: Path, name: str) -> Path:
    """Where the clone of ``owner/name`` lies.

    Raises:
        NotRun: If there is none, or it is at another commit.
    """
    owner, project = name.split("/")
    for folder in (repos / f"{owner}+{project}", repos / owner / project, repos / project):
        if folder.is_dir():
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            if head != REPOSITORIES[name]:
                raise NotRun(f"the clone of {name} is at {head[:12] or 'no commit'}, not at {REPOSITORIES[name][:12]}")
            return folder
    raise NotRun(f"no clone of {name} in the directory of --repos")


def load(root: Path, module: str, absent: tuple[str, ...] = ()) -> Any:
    """The module below `root`, without the code of the packages around it.

    Args:
        root: Folder that holds its outermost package.
        module: Dotted name.
        absent: Names of modules that it imports and that are stood in for.
    """
    for name in absent:
        sys.modules.setdefault(name, mock.MagicMock())
    folder = root
    parts = module.split(".")
    for depth, part in enumerate(parts[:-1], start=1):
        folder = folder / part
        bare = ModuleType(".".join(parts[:depth]))
        bare.__path__ = [str(folder)]
        sys.modules.setdefault(bare.__name__, bare)
    if len(parts) == 1:
        sys.path.insert(0, str(root))
    return importlib.import_module(module)


def pytorch_reference(repository: str, n: int, repos: Path) -> Case:
    """YentlCollin and gaspardbd: three branches of dense masks, one projection, rotary."""
    module = load(clone(repos, repository), "native_sparse_attention.pytorch_reference")
    config = SimpleNamespace(
        hidden_size=64, num_heads=4, head_dim=16, num_kv_heads=2, block_size=16, block_counts=3, window_size=32,
        dropout=0.0, nsa_mode="all",
    )  # fmt: skip
    cos, sin = module.precompute_rope(16, 256)
    model = randomise(module.ReferenceNativeSparseAttention(config))
    return Case(model, randoms((2, n, 64)), {"rope_cos": cos, "rope_sin": sin})


def zoology(causal: bool, share: bool, repos: Path) -> Case:
    """A descendant of lucidrains' layer."""
    module = load(clone(repos, "HazyResearch/zoology"), "zoology.mixers.deepseek_nsa")
    model = module.SparseAttention(
        d_model=64, num_heads=4, kv_heads=2, sliding_window_size=32, compress_block_size=16, selection_block_size=16,
        num_selected_blocks=3, causal=causal, query_heads_share_selected_kv=share,
    )  # fmt: skip
    return Case(randomise(model), randoms((2, 192, 64)))


def moba(repos: Path) -> Case:
    """One packed sequence of 192 tokens, 3 of 12 blocks."""
    function = load(clone(repos, "MoonshotAI/MoBA"), "moba.moba_naive").moba_attn_varlen_naive
    keywords = {"cu_seqlens": torch.tensor([0, 192]), "max_seqlen": 192, "moba_chunk_size": 16, "moba_topk": 3}
    return Case(function, _thd(192, 4, 4), keywords)


def xunhao_selected(repos: Path) -> Case:
    """One packed sequence of 96 tokens; the block list is an input."""
    root = clone(repos, "XunhaoLai/native-sparse-attention-triton")
    function = load(root, "native_sparse_attention.ops.torch.topk_sparse_attention").topk_sparse_attention_torch
    keywords = {"topk_idx": picks(1, 2, 96, 16, 3)[0], "block_size_k": 16, "cu_seqlens": torch.tensor([0, 96], dtype=torch.int32)}
    return Case(function, _thd(96, 4, 2), keywords)


def xunhao_compressed(repos: Path) -> Case:
    """One packed sequence of 192 tokens, compressed by 16 with stride 8."""
    root = clone(repos, "XunhaoLai/native-sparse-attention-triton")
    function = load(root, "native_sparse_attention.ops.torch.compressed_attention").compressed_attention_torch
    keywords = {
        "kernel_size": 16, "kernel_stride": 8, "block_size": 16, "topk": 3, "max_seqlen_q": 192, "max_seqlen_k": 23,
        "cu_seqlens_q": torch.tensor([0, 192], dtype=torch.int32), "cu_seqlens_k": torch.tensor([0, 23], dtype=torch.int32),
    }  # fmt: skip
    return Case(function, randoms((192, 4, 16), (23, 2, 16), (23, 2, 16)), keywords, lambda result: result[0])


def flash_moba(repos: Path) -> Case:
    """The reference of its tests; the block mask is an input."""
    module = load(clone(repos, "mit-han-lab/flash-moba"), "flash_moba.moba_test_utils")

    def attention(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        mask = module.prepare_moba_ref_mask(blocks, 16, q.shape[1], k.shape[1], device=q.device)
        return module.attention_moba_sparse_ref(q, k, v, mask, 16, causal=True)[0]

    return Case(attention, (*_bnhd(2, 192, 4, 2), block_mask(picks(2, 4, 192, 16, 3), 12)))


def infllm(indices: bool, repos: Path) -> Case:
    """The reference of its tests; the block mask, or the list behind it, is an input."""
    root = clone(repos, "OpenBMB/infllmv2_cuda_impl") / "tests"
    os.chdir(tempfile.mkdtemp())  # the module makes a folder for plots when it is imported
    module = load(root, "utils", ("matplotlib", "matplotlib.pyplot"))

    def attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        n = k.shape[1]
        blocks = module.convert_batch_topk_to_base_blockmask(chosen, n, 16, q.device) if indices else chosen
        mask = module.prepare_batch_mixed_mask(blocks, n, n, q.shape[2], k.shape[2], 16)
        return module.attention_blocksparse_ref(q, k, v, mask, causal=True)[0]

    chosen = picks(2, 2, 192, 16, 3)
    return Case(attention, (*_bnhd(2, 192, 4, 2), chosen if indices else block_mask(chosen, 12)))


def infllm_decode(repos: Path) -> Case:
    """One query against 192 keys; the mask over tokens is an input."""
    root = clone(repos, "OpenBMB/infllmv2_cuda_impl") / "tests"
    function = load(root, "test_kvcache_simple", ("infllm_v2",)).naive_attention
    mask = block_mask(picks(2, 4, 192, 16, 3), 12)[:, :, -1:].repeat_interleave(16, -1)
    return Case(function, (*randoms((2, 4, 1, 16), (2, 2, 192, 16), (2, 2, 192, 16)), mask))


def quest(repos: Path) -> Case:
    """Pages of 16 keys by the bounds of their channels, 3 of 12 for each query; attention as the hub computes it."""
    root = clone(repos, "skylight-org/sparse-attention-hub")
    hub = "sparse_attention_hub.sparse_attention"
    masks, attend = load(root, f"{hub}.utils.mask"), load(root, f"{hub}.utils.mask_attention_utils")
    implementations = f"{hub}.research_attention.maskers.fixed.implementations"
    load(root, f"{implementations}.utils.quest_utils")  # before its package is, so that the others are not imported
    module = load(root, f"{implementations}.quest_top_k", ("ray", "ray.tune"))
    masker = module.QuestTopKMasker(module.QuestTopKMaskerConfig(heavy_size=48, page_size=16))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        causal = torch.full((1, 1, n, n), torch.finfo(q.dtype).min).triu(1)
        shared: dict[str, Any] = {"keys": k, "queries": q, "values": v, "attention_mask": causal, "scaling": 0.25, "dropout": 0.0}
        empty = masks.Mask.create_empty_mask((*q.shape[:3], n), q.dtype, q.device)
        mask = masker.add_mask(sparse_meta_data={}, previous_mask=empty, **shared)
        return attend.get_masked_attention_output(module=None, sinks=None, sparse_attention_mask=mask, **shared)

    return Case(attention, randoms((2, 4, 192, 16), (2, 2, 192, 16), (2, 2, 192, 16)))


def tilelang(name: str, n: int, repos: Path) -> Case:
    """The references of its example; blocks of 4."""
    function = getattr(load(clone(repos, "tile-ai/tilelang") / "examples" / "deepseek_nsa", "reference"), name)
    indices = picks(1, 2, n, 4, 2).transpose(1, 2)
    if name == "naive_nsa":
        gates = torch.rand(2, 1, n, 4, generator=torch.Generator().manual_seed(4))
        return Case(function, (*_bnhd(1, n, 4, 2), *gates), {"block_indices": indices, "block_size": 4, "window_size": 8})
    q, k, v = _bnhd(1, n, 4, 2)
    counts = torch.full((1, n, 2), 2)
    if name == "naive_nsa_simple_inference":
        q, indices, counts = q[:, -1:], indices[:, -1:], counts[:, -1:]
    indices = indices.clamp(min=0)  # it has no rule for -1
    return Case(function, (q, k, v), {"block_indices": indices, "block_counts": counts, "block_size": 4})


def zeroagi(repos: Path) -> Case:
    """512 tokens, because it selects 16 blocks whatever it is told."""
    module = load(clone(repos, "ZeroAGI/NSA-pytorch"), "nsa")
    return Case(randomise(module.NativeSparseAttention(32, 2, 16, 16, 64)), randoms((2, 512, 32)))


def aman(repos: Path) -> Case:
    """Without rotary, whose module does not take the tensors that it is given."""
    module = load(clone(repos, "aman-17/911") / "pre_training", "nn.attention.native_sparse_attention")
    model = module.NativeSparseAttention(32, 32, 192, 4, 0.0, torch.float32, n_kv_heads=2, use_rope=False, window_size=32)
    return Case(randomise(model), randoms((2, 192, 32)))


def artyomche9(repos: Path) -> Case:
    """48 tokens: its window is a loop over them."""
    module = load(clone(repos, "artyomche9/NSA-Torch"), "nsa.nsa")
    gates = torch.rand(3, 2, 48, 1, generator=torch.Generator().manual_seed(4))
    return Case(module.NSA(8, 16, 2), (*randoms((2, 48, 16), (2, 48, 16), (2, 48, 16)), *gates))


def yacine(repos: Path) -> Case:
    """128 tokens, 3 of 8 blocks."""
    module = load(clone(repos, "yacine-baghli/minilm-bench"), "model.attention.nsa")
    model = module.NativeSparseAttention(64, 4, 2, 16, block_size=16, top_k_blocks=3, window_size=32)
    angles = torch.rand(128, 8, generator=torch.Generator().manual_seed(4))
    return Case(randomise(model), randoms((2, 128, 64)), {"freqs_cis": torch.polar(torch.ones_like(angles), angles)})


def select2win(repos: Path) -> Case:
    """A descendant of lucidrains' layer for point clouds, without causality."""
    module = load(clone(repos, "sparse-attention-span/Select2Win"), "models.native_sparse_attention")
    model = module.SparseAttention(
        dim=64, dim_head=16, heads=4, kv_heads=2, sliding_window_size=24, compress_block_size=16,
        compress_block_sliding_stride=8, selection_block_size=16, num_selected_blocks=3,
    )  # fmt: skip
    return Case(randomise(model), randoms((2, 192, 64)))


def select2win_balls(repos: Path) -> Case:
    """Attention to balls of 4 points, 2 of 16 for each point."""
    root = clone(repos, "sparse-attention-span/Select2Win")
    module = load(root, "models.erwin", ("torch_cluster", "balltree"))
    model = module.NSAMSA(32, 2, ball_size=8, topk=2, selection_ball_size=4, implementation="pytorch")
    return Case(randomise(model), randoms((128, 32), (128, 3)), {"num_batches": 2})


def lulzx(repos: Path) -> Case:
    """128 tokens in chunks of 32; tokens selected by hashing."""
    module = load(clone(repos, "Lulzx/subquadratic-sparse-attention"), "ssa.model")
    return Case(randomise(module.SSAAttention(64, 4, window=32)), randoms((2, 128, 64)), output=lambda result: result[0])


def _bnhd(b: int, n: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (b, n, h, 16)."""
    return randoms((b, n, heads, 16), (b, n, kv_heads, 16), (b, n, kv_heads, 16))


def _thd(n: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (n, h, 16)."""
    return randoms((n, heads, 16), (n, kv_heads, 16), (n, kv_heads, 16))


@dataclass(frozen=True)
class Public:
    """A model of a repository.

    Args:
        repository: ``"owner/name"``.
        build: Builds the case from the directory of clones.
    """

    repository: str
    build: Callable[..., Case]


MODELS: Mapping[str, Public] = {
    "YentlCollin, 192 tokens": Public(
        "YentlCollin/native-sparse-attention", partial(pytorch_reference, "YentlCollin/native-sparse-attention", 192)
    ),
    "YentlCollin, 200 tokens": Public(
        "YentlCollin/native-sparse-attention", partial(pytorch_reference, "YentlCollin/native-sparse-attention", 200)
    ),
    "gaspardbd, 192 tokens": Public(
        "gaspardbd/NativeSparseAttention", partial(pytorch_reference, "gaspardbd/NativeSparseAttention", 192)
    ),
    "gaspardbd, 200 tokens": Public(
        "gaspardbd/NativeSparseAttention", partial(pytorch_reference, "gaspardbd/NativeSparseAttention", 200)
    ),
    "zoology, causal": Public("HazyResearch/zoology", partial(zoology, True, True)),
    "zoology, causal, per query head": Public("HazyResearch/zoology", partial(zoology, True, False)),
    "zoology, not causal": Public("HazyResearch/zoology", partial(zoology, False, True)),
    "MoBA naive": Public("MoonshotAI/MoBA", moba),
    "XunhaoLai topk_sparse_attention_torch": Public("XunhaoLai/native-sparse-attention-triton", xunhao_selected),
    "XunhaoLai compressed_attention_torch": Public("XunhaoLai/native-sparse-attention-triton", xunhao_compressed),
    "flash-moba attention_moba_sparse_ref": Public("mit-han-lab/flash-moba", flash_moba),
    "infllmv2 attention_blocksparse_ref": Public("OpenBMB/infllmv2_cuda_impl", partial(infllm, False)),
    "infllmv2 attention_blocksparse_ref, from top-k indices": Public("OpenBMB/infllmv2_cuda_impl", partial(infllm, True)),
    "infllmv2 decode reference": Public("OpenBMB/infllmv2_cuda_impl", infllm_decode),
    "sparse-attention-hub, quest pages": Public("skylight-org/sparse-attention-hub", quest),
    "tilelang naive_nsa": Public("tile-ai/tilelang", partial(tilelang, "naive_nsa", 24)),
    "tilelang naive_nsa_simple": Public("tile-ai/tilelang", partial(tilelang, "naive_nsa_simple", 12)),
    "tilelang naive_nsa_simple_inference": Public("tile-ai/tilelang", partial(tilelang, "naive_nsa_simple_inference", 24)),
    "ZeroAGI": Public("ZeroAGI/NSA-pytorch", zeroagi),
    "aman-17/911": Public("aman-17/911", aman),
    "artyomche9": Public("artyomche9/NSA-Torch", artyomche9),
    "yacine-baghli": Public("yacine-baghli/minilm-bench", yacine),
    "Select2Win SparseAttention": Public("sparse-attention-span/Select2Win", select2win),
    "Select2Win NSAMSA, pytorch": Public("sparse-attention-span/Select2Win", select2win_balls),
    "Lulzx": Public("Lulzx/subquadratic-sparse-attention", lulzx),
}
"""Builders by the name that ``expected.md`` uses."""
