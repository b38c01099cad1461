"""Three models that know nothing of fsa_compile, eagerly and under ``torch.compile(model, backend="fsa")``.

    python examples/quickstart.py            # a few minutes on two cores; most of it is Inductor compiling
    python examples/quickstart.py --quick    # a minute: shorter sequences, and aot_eager in Inductor's place

For each model: what the backend reports, then the time of one forward + backward pass, the peak memory, and the largest
difference of the output and all gradients. Needs the extra ``models``; no GPU. Weights are random, dtype is float32.

Each run has a process of its own, so that its peak memory is its own. Memory is the growth of the resident set over the loaded
model, from before the first pass to the end: what the compiler itself takes is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIM, VOCABULARY = 256, 256


def lucidrains(length: int) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The Transformer of native-sparse-attention-pytorch, two layers: gathered blocks, memory tokens, chunked window."""
    from native_sparse_attention_pytorch.transformer import Transformer

    model = Transformer(
        num_tokens=VOCABULARY, dim=DIM, depth=2, heads=4, kv_heads=2, use_sparse_attn=True,
        sparse_attn_kwargs={
            "sliding_window_size": 64, "compress_block_size": 32, "compress_block_sliding_stride": 16,
            "selection_block_size": 32, "num_selected_blocks": 7,
        },
    )  # fmt: skip
    return model, torch.randint(0, VOCABULARY, (1, length)), {}


def minimax_m3(length: int) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """MiniMax-M3's text model of transformers, one dense and two block-sparse layers, experts included."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

    config = MiniMaxM3VLTextConfig(
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], num_hidden_layers=3,
        hidden_size=DIM, head_dim=64, rotary_dim=32, num_attention_heads=8, num_key_value_heads=2,
        index_n_heads=2, index_head_dim=64, index_block_size=64, index_topk_blocks=4, index_local_blocks=1,
        intermediate_size=256, shared_intermediate_size=256, dense_intermediate_size=512,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY, max_position_embeddings=1 << 16,
        bos_token_id=0, eos_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    return MiniMaxM3VLTextModel(config), torch.randint(0, VOCABULARY, (1, length)), {"use_cache": False}


def dense_nsa(length: int) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The layer of `dense_nsa.py` beside this file: three branches, each a dense mask over all keys."""
    from dense_nsa import DenseNSA

    return DenseNSA(dim=DIM, topk=8, window=256), torch.randn(1, length, DIM), {}


MODELS: dict[str, Callable[[int], tuple[nn.Module, Tensor, dict[str, Any]]]] = {
    "native-sparse-attention-pytorch: Transformer": lucidrains,
    "transformers: MiniMax-M3 text model": minimax_m3,
    "examples/dense_nsa.py: DenseNSA": dense_nsa,
}


def randomise(model: nn.Module) -> None:
    """Parameters at random, the same in every process; gates and memory tokens that start at 0 would hide a difference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5))


def resident_mib() -> float:
    """The resident set now; where the system does not tell, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_mib()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib() -> float:
    """The largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name: str, length: int, inner: str | None, repeats: int, results: Path) -> None:
    """One model in this process, eagerly if `inner` is None: writes tensors to `results`, prints times and memory as JSON."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, x, keywords = MODELS[name](length)
    randomise(model)
    run: Callable[..., Any] = model
    if inner is not None:
        run = torch.compile(model, backend="fsa", options={"inner": inner, "report": "summary"})
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def step() -> tuple[float, dict[str, Tensor]]:
        start = time.perf_counter()
        result = run(x, **keywords)
        out = result if isinstance(result, Tensor) else result.last_hidden_state
        gradients = torch.autograd.grad(out.square().mean(), list(parameters.values()), allow_unused=True)
        seconds = time.perf_counter() - start
        named = {k: g for k, g in zip(parameters, gradients, strict=True) if g is not None}
        return seconds, {"output": out.detach(), **named}

    loaded = resident_mib()
    first, tensors = step()
    torch.save(tensors, results)
    del tensors
    second, _ = step()  # models that fill a cache of positions in their first call are compiled once more
    seconds = statistics.median(step()[0] for _ in range(repeats))
    print(json.dumps({"seconds": seconds, "warm_up": first + second, "mib": peak_mib() - loaded}))


def in_fresh_process(name: str, length: int, inner: str | None, repeats: int, results: Path) -> dict[str, float]:
    """`measure` in a process of its own; the report goes to this process's stderr."""
    command = [sys.executable, __file__, "--measure", name, "--length", str(length), "--repeats", str(repeats)]
    command += ["--results", str(results), *(["--inner", inner] if inner is not None else ["--eager"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(a: Path, b: Path) -> tuple[float, str]:
    """Norm of the difference over the norm of `b`, of the tensor where it is largest, and that tensor's name."""
    left, right = torch.load(a), torch.load(b)
    assert left.keys() == right.keys()
    return max((((left[k] - right[k]).norm() / right[k].norm()).item(), k) for k in right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 tokens and aot_eager, unless told otherwise")
    parser.add_argument("--length", type=int, help="tokens (default: 2048)")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), help="what compiles the rest (default: inductor)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes, of which the median counts (default: 3)")
    for internal in ("--measure", "--results"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    length = arguments.length or (1024 if arguments.quick else 2048)
    inner = arguments.inner or ("aot_eager" if arguments.quick else "inductor")
    if arguments.measure:
        inner = None if arguments.eager else inner
        measure(arguments.measure, length, inner, arguments.repeats, Path(arguments.results))
        return

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {length} tokens, float32, inner compiler {inner}")
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "eager.pt", Path(folder) / "fsa.pt"
        for name in MODELS:
            print(f"\n{name}", flush=True)
            eager = in_fresh_process(name, length, None, arguments.repeats, before)
            fsa = in_fresh_process(name, length, inner, arguments.repeats, after)
            difference, tensor = largest_difference(after, before)
            print(f"  {'':8}{'forward + backward':>20}{'peak memory':>16}{'two calls to warm up':>23}")
            for label, row in (("eager", eager), ("fsa", fsa)):
                print(f"  {label:8}{row['seconds'] * 1e3:>17.0f} ms{row['mib']:>12.0f} MiB{row['warm_up']:>21.1f} s")
            print(
                f"  {eager['seconds'] / fsa['seconds']:.1f} times faster, {eager['mib'] / fsa['mib']:.1f} times less memory, "
                f"largest difference {difference:.1e} ({tensor})"
            )


if __name__ == "__main__":
    main()
