"""Models of packages on PyPI, unmodified, small, with random weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from .trial import Case, NotRun, picks, randomise, randoms

LENGTH, BATCH, DIM, VOCABULARY = 256, 2, 64, 64

LUCIDRAINS = {
    "sliding_window_size": 24,
    "compress_block_size": 16,
    "compress_block_sliding_stride": 8,
    "selection_block_size": 16,
    "num_selected_blocks": 3,
}
SIZES = {"dim": DIM, "dim_head": 16, "heads": 4, "kv_heads": 2}


def tokens(n: int = LENGTH) -> torch.Tensor:
    """Random token numbers (BATCH, n)."""
    return torch.randint(0, VOCABULARY, (BATCH, n), generator=torch.Generator().manual_seed(1))


def package(name: str, install: str) -> Any:
    """The module of that name.

    Raises:
        NotRun: If it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as fault:
        raise NotRun(f"{name} is not installed ({install}): {fault}") from fault


def lucidrains_layer(**options: Any) -> Case:
    """`SparseAttention` with grouped queries."""
    module = package("native_sparse_attention_pytorch", "pip install native-sparse-attention-pytorch==0.2.3")
    return Case(randomise(module.SparseAttention(**SIZES, **LUCIDRAINS, **options)), randoms((BATCH, LENGTH, DIM)))


def lucidrains_transformer(causal: bool, flex: bool = False, **options: Any) -> Case:
    """`Transformer` of two layers; `flex`: window and selection by flex_attention, which has no backward on CPUs."""
    module = package("native_sparse_attention_pytorch.transformer", "pip install native-sparse-attention-pytorch==0.2.3")
    model = module.Transformer(
        num_tokens=VOCABULARY, depth=2, use_sparse_attn=True, causal=causal, sparse_attn_kwargs={**LUCIDRAINS, **options},
        use_flex_sliding_window=flex, use_flex_fine_selection=flex, **SIZES,
    )  # fmt: skip
    return Case(randomise(model), (tokens(),), backward=not flex)


def minimax_m3(implementation: str) -> Case:
    """MiniMax-M3's text model: one dense and two block-sparse layers, experts included, no cache."""
    models = package("transformers.models.minimax_m3_vl", "pip install transformers==5.23.*")
    config = models.MiniMaxM3VLTextConfig(
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], num_hidden_layers=3,
        hidden_size=DIM, head_dim=16, rotary_dim=8, num_attention_heads=4, num_key_value_heads=2,
        index_n_heads=2, index_head_dim=16, index_block_size=16, index_topk_blocks=4, index_local_blocks=1,
        intermediate_size=32, shared_intermediate_size=32, dense_intermediate_size=128,
        num_local_experts=4, num_experts_per_tok=2,
        vocab_size=VOCABULARY, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, attn_implementation=implementation,
    )  # fmt: skip
    model = randomise(models.MiniMaxM3VLTextModel(config))
    return Case(model, (tokens(),), {"use_cache": False}, lambda result: result.last_hidden_state)


def deepseek_v32(implementation: str) -> Case:
    """DeepSeek-V3.2: two layers of which each query attends to the 32 tokens that its indexer picks."""
    models = package("transformers.models.deepseek_v32", "pip install transformers==5.23.*")
    config = models.DeepseekV32Config(
        vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=DIM, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        index_topk=32, index_head_dim=16, index_n_heads=2, first_k_dense_replace=1, max_position_embeddings=512,
        attn_implementation=implementation,
    )  # fmt: skip
    model = randomise(models.DeepseekV32Model(config))
    return Case(model, (tokens(),), {"use_cache": False}, lambda result: result.last_hidden_state)


def fla_naive() -> Any:
    """`fla.ops.nsa.naive`."""
    return package("fla.ops.nsa.naive", "pip install --no-deps fla-core==0.6.0")


def fla_selection() -> Case:
    """A loop over 24 queries."""
    indices = picks(1, 2, 24, 4, 3).transpose(1, 2)
    return Case(partial(fla_naive().naive_nsa_selection, block_size=4), (*_bnhd(1, 24, 4, 2), indices))


def fla_compression() -> Case:
    """A loop over a batch of two."""
    q, _, _ = _bnhd(2, 192, 4, 2)
    keys, values = randoms((2, 12, 2, 16), (2, 12, 2, 16), seed=3)
    function = partial(fla_naive().naive_nsa_compression, block_size=16, scale=0.25)
    return Case(function, (q, keys, values), output=lambda result: result[0])


def fla_whole() -> Case:
    """All of `naive_nsa`, which pools keys in Triton."""
    gates = torch.rand(2, 1, 64, 16, generator=torch.Generator().manual_seed(4))
    function = partial(fla_naive().naive_nsa, block_counts=2, block_size=16)
    return Case(function, (*_bnhd(1, 64, 16, 1), *gates))


def _bnhd(b: int, n: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values (b, n, h, 16)."""
    return randoms((b, n, heads, 16), (b, n, kv_heads, 16), (b, n, kv_heads, 16))


def _lucidrains() -> dict[str, Callable[[], Case]]:
    """Every setting of the layer and of the transformer."""
    found: dict[str, Callable[[], Case]] = {}
    for name, build in (("lucidrains SparseAttention", lucidrains_layer), ("lucidrains Transformer", lucidrains_transformer)):
        for causal, share, differentiable in itertools.product((True, False), (True, False), (False, True)):
            parts = [name, "causal" if causal else "not causal"]
            parts += ["per query head"] * (not share) + ["diff top-k"] * differentiable
            found[", ".join(parts)] = partial(
                build, causal=causal, query_heads_share_selected_kv=share, use_diff_topk=differentiable
            )
    return found


MODELS: Mapping[str, Callable[[], Case]] = {
    **_lucidrains(),
    "lucidrains Transformer, causal, flex_attention": partial(lucidrains_transformer, causal=True, flex=True),
    "MiniMax-M3, eager": partial(minimax_m3, "eager"),
    "MiniMax-M3, sdpa": partial(minimax_m3, "sdpa"),
    "DeepSeek-V3.2, eager": partial(deepseek_v32, "eager"),
    "DeepSeek-V3.2, sdpa": partial(deepseek_v32, "sdpa"),
    "fla-core naive_nsa": fla_whole,
    "fla-core naive_nsa_selection": fla_selection,
    "fla-core naive_nsa_compression": fla_compression,
}
"""Builders by the name that ``expected.md`` uses."""
