"""The models, small enough to compile in seconds, with random weights.

Everywhere selections cover a quarter of the blocks: 256 tokens are 16 blocks of 16, of which a query lists 4.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from native_sparse_attention_pytorch import SparseAttention
from native_sparse_attention_pytorch.transformer import Transformer
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

from .harness import Subject, randomise, subject

LENGTH = 256
BATCH = 2
DIM = 64
VOCABULARY = 64

LUCIDRAINS = {
    "sliding_window_size": 24,
    "compress_block_size": 16,
    "compress_block_sliding_stride": 8,
    "selection_block_size": 16,
    "num_selected_blocks": 3,  # and the query's own
}


def tokens(n: int = LENGTH, batch: int = BATCH, seed: int = 1) -> torch.Tensor:
    """Random token numbers (batch, n)."""
    return torch.randint(0, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


def hidden(n: int = LENGTH, batch: int = BATCH, seed: int = 1) -> torch.Tensor:
    """Random hidden states (batch, n, DIM)."""
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(seed))


def lucidrains_layer(n: int = LENGTH, batch: int = BATCH, seed: int = 0, **options: Any) -> Subject:
    """`SparseAttention` with grouped queries; gates, memory tokens and positions at random.

    The gates of a new layer are 0.12, 0.12 and 0.88 and its memory tokens are 0, which would hide errors.
    """
    settings = {"causal": True, **LUCIDRAINS, **options}
    model = SparseAttention(dim=DIM, dim_head=16, heads=4, kv_heads=2, **settings)
    randomise(model, seed)
    return subject(model, hidden(n, batch))


def lucidrains_transformer(n: int = LENGTH, seed: int = 0) -> Subject:
    """`Transformer` of two layers with sparse attention."""
    model = Transformer(
        num_tokens=VOCABULARY, dim=DIM, depth=2, dim_head=16, heads=4, kv_heads=2,
        use_sparse_attn=True, sparse_attn_kwargs=dict(LUCIDRAINS),
    )  # fmt: skip
    randomise(model, seed)
    return subject(model, tokens(n))


def minimax_m3(implementation: str, n: int = LENGTH, seed: int = 0) -> Subject:
    """MiniMax-M3's text model: one dense and two block-sparse layers, experts included, no cache."""
    config = MiniMaxM3VLTextConfig(
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], num_hidden_layers=3,
        hidden_size=DIM, head_dim=16, rotary_dim=8, num_attention_heads=4, num_key_value_heads=2,
        index_n_heads=2, index_head_dim=16, index_block_size=16, index_topk_blocks=4, index_local_blocks=1,
        intermediate_size=32, shared_intermediate_size=32, dense_intermediate_size=128,
        num_local_experts=4, num_experts_per_tok=2,
        vocab_size=VOCABULARY, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        attn_implementation=implementation,
    )  # fmt: skip
    model = MiniMaxM3VLTextModel(config)
    randomise(model, seed)
    return subject(model, tokens(n), use_cache=False, output=lambda result: result.last_hidden_state)


@cache
def dense_nsa_example() -> ModuleType:
    """`examples/dense_nsa.py`, which is a script and in no package."""
    path = Path(__file__).parents[2] / "examples" / "dense_nsa.py"
    spec = importlib.util.spec_from_file_location("dense_nsa", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo imports the modules whose globals it reads
    spec.loader.exec_module(module)
    return module


def dense_nsa(n: int = LENGTH, batch: int = BATCH, seed: int = 0) -> Subject:
    """The three-branch layer of the examples, all of it dense masks."""
    model = dense_nsa_example().DenseNSA(
        dim=DIM, heads=4, kv_heads=2, dim_head=16, block=16, topk=4, window=32, compress_block=8, compress_stride=4
    )
    randomise(model, seed)
    return subject(model, hidden(n, batch))
