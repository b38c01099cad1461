"""Analysis time against depth: what a model of 32 equal layers costs beyond its first layer.

    python benchmarks/depth.py                          # five models at 1, 2, 8 and 32 layers, kept as JSON
    python benchmarks/depth.py --layers 1 4 --output -  # printed and not kept

``analysis_s`` is the report's own account of all stages, shadow to rewrite, of the forward graph with gradients; the rest of the
graph is handed to "eager", so that nothing else takes time. Each (model, depth) is a process of its own. `rewritten` counts sites.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import fsa_compile

ROOT = Path(__file__).resolve().parents[1]


def dense_nsa(layers: int) -> tuple[nn.Module, Tensor]:
    """Pre-norm blocks around the layer of `examples/dense_nsa.py`."""
    sys.path.insert(0, str(ROOT / "examples"))
    from dense_nsa import DenseNSA

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.attention = DenseNSA(64, 4, 2, 16, block=16, topk=4, window=48, compress_block=8, compress_stride=4)
            self.mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm(x))
            return x + self.mlp(x)

    return nn.Sequential(*(Block() for _ in range(layers))), torch.randn(1, 256, 64)


def checkpointed_nsa(layers: int) -> tuple[nn.Module, Tensor]:
    """`dense_nsa`, every block under `torch.utils.checkpoint`: Dynamo makes a graph of each."""
    blocks, x = dense_nsa(layers)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    return Model(), x


def flex_window(layers: int) -> tuple[nn.Module, Tensor]:
    """Pre-norm windows by `flex_attention`, every layer with a block mask of its own."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 48)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            mask = create_block_mask(seen, None, None, x.shape[1], x.shape[1], device="cpu")
            return x + self.out(flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2))

    model = nn.Sequential(*(Block() for _ in range(layers)))
    return model.requires_grad_(False), torch.randn(1, 256, 64)  # flex_attention has no backward on the CPU


def lucidrains(layers: int) -> tuple[nn.Module, Tensor]:
    """The `Transformer` of native-sparse-attention-pytorch."""
    from native_sparse_attention_pytorch.transformer import Transformer

    sparse = dict(
        sliding_window_size=8, compress_block_size=8, compress_block_sliding_stride=4, selection_block_size=8,
        num_selected_blocks=2,
    )  # fmt: skip
    model = Transformer(
        num_tokens=64, dim=64, depth=layers, heads=4, dim_head=16, kv_heads=2, use_sparse_attn=True, sparse_attn_kwargs=sparse
    )
    return model, torch.randint(0, 64, (1, 128))


def minimax_m3(layers: int) -> tuple[nn.Module, Tensor]:
    """The text model of MiniMax-M3 in transformers, every layer block-sparse."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

    config = MiniMaxM3VLTextConfig(
        num_hidden_layers=layers, layer_types=["minimax_m3_sparse"] * layers,
        hidden_size=64, head_dim=16, rotary_dim=8, num_attention_heads=4, num_key_value_heads=2,
        index_n_heads=2, index_head_dim=16, index_block_size=16, index_topk_blocks=4, index_local_blocks=1,
        intermediate_size=32, shared_intermediate_size=32, dense_intermediate_size=128,
        num_local_experts=4, num_experts_per_tok=2,
        vocab_size=64, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, use_cache=False,
    )  # fmt: skip
    return MiniMaxM3VLTextModel(config), torch.randint(0, 64, (1, 256))


MODELS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "dense_nsa": dense_nsa, "checkpointed_nsa": checkpointed_nsa, "flex_window": flex_window,
    "lucidrains": lucidrains, "minimax_m3": minimax_m3,
}  # fmt: skip


def measure(name: str, layers: int) -> dict[str, object]:
    """Analysis of one model in this process."""
    torch.manual_seed(0)
    model, x = MODELS[name](layers)
    options = {"inner": "eager", "profit": "always", "proof_seconds": 20.0}
    torch.compile(model, backend="fsa", options=options)(x)
    report = fsa_compile.last_report()
    stages: dict[str, float] = {}
    for graph in report.graphs:
        for stage, seconds in graph.seconds.items():
            stages[stage] = round(stages.get(stage, 0.0) + seconds, 3)
    return {
        "model": name, "layers": layers, "nodes": sum(g.nodes for g in report.graphs), "sites": len(report.sites),
        "rewritten": report.rewritten, "analysis_s": round(sum(stages.values()), 3), "stages_s": stages,
    }  # fmt: skip


def main() -> None:
    """Measure all, print a table, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 8, 32])
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "depth.json"), help="a file, or - for none")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    rows = []
    for name in arguments.models:
        for layers in arguments.layers:
            command = [sys.executable, __file__, "--one", name, str(layers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            first = next((r for r in rows if r["model"] == name), row)
            row["beyond_first_s"] = round(row["analysis_s"] - first["analysis_s"], 3)
            rows.append(row)
            print(f"{name:16} {layers:3} layers {row['nodes']:6} nodes  {row['rewritten']:3} of {row['sites']:3} rewritten  "
                  f"{row['analysis_s']:6.2f} s, beyond the first row {row['beyond_first_s']:6.2f} s", flush=True)  # fmt: skip
    if arguments.output != "-":
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit, "torch": torch.__version__,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }  # fmt: skip
        Path(arguments.output).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
