"""The backend on a GPU: the real models of ``tests/models`` with the Triton kernels and Inductor behind it.

Run with ``pytest -m gpu``. What is compared is what the CPU tests compare; sizes are such that several tiles are in play.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the CUDA kernels are written in Triton")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from dense_nsa import DenseNSA  # noqa: E402

import fsa_compile  # noqa: E402

ROLES = ["compressed", "selected", "sliding_window"]
TOLERANCE = 1e-5  # float32, norm-wise: sums over a thousand keys round at 1e-7 to 1e-6


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="fsa", fullgraph=True, options={"profit": "always", "strict": True, "proof_seconds": 60, **options})


def outcome(function, model, *inputs, pick=lambda out: out, **keywords):
    """Output and all parameter gradients of a random functional, by name."""
    out = pick(function(*inputs, **keywords))
    g = torch.Generator(out.device).manual_seed(1)
    upstream = torch.randn(out.shape, generator=g, device=out.device).to(out.dtype)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out, [p for p in model.parameters() if p.requires_grad], upstream, allow_unused=True)
    return {"output": out.detach(), **{n: t for n, t in zip(names, gradients, strict=True) if t is not None}}


def errors(got, want):
    assert got.keys() == want.keys()
    return {k: ((got[k].double() - w.double()).norm() / w.double().norm().clamp_min(1e-30)).item() for k, w in want.items()}


def roles():
    return sorted(s.role for s in fsa_compile.last_report().sites if s.verdict == "rewritten")


def dense(n=1024, dtype=torch.float32):
    torch.manual_seed(0)
    model = DenseNSA(dim=256, heads=8, kv_heads=2, dim_head=64, block=32, topk=8, window=128).cuda()
    x = torch.randn(2, n, 256, device="cuda")
    return model.to(dtype), x.to(dtype)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_dense_float32(inner):
    model, x = dense()
    got = outcome(compiled(model, inner=inner), model, x)
    assert roles() == ROLES
    worst = errors(got, outcome(model, model, x))
    assert max(worst.values()) < TOLERANCE, worst


def test_dense_bfloat16_is_as_exact_as_inductor():
    model, x = dense(dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()
    exact = outcome(wide, wide, x.float())
    ours = errors(outcome(compiled(model), model, x), exact)
    assert roles() == ROLES
    torch._dynamo.reset()
    plain = errors(outcome(torch.compile(model, fullgraph=True), model, x), exact)
    too_far = {k: (e, plain[k]) for k, e in ours.items() if e > 1.5 * plain[k]}
    assert not too_far, too_far


def test_dense_under_cuda_graphs():
    model, x = dense()
    run = compiled(model, **{"triton.cudagraphs": True})
    with torch.no_grad():
        want = model(x)
        for _ in range(4):  # warm-up, recording, replay
            got = run(x).clone()
    assert roles() == ROLES
    assert ((got - want).norm() / want.norm()).item() < TOLERANCE


def test_head_dim_without_a_kernel_still_runs():
    torch.manual_seed(0)
    model = DenseNSA(dim=64, heads=4, kv_heads=2, dim_head=40, block=16, topk=4, window=64).cuda()
    x = torch.randn(1, 512, 64, device="cuda")
    got = outcome(compiled(model, inner="aot_eager"), model, x)
    assert roles() == ROLES
    worst = errors(got, outcome(model, model, x))
    assert max(worst.values()) < TOLERANCE, worst


def test_lucidrains():
    nsa = pytest.importorskip("native_sparse_attention_pytorch", reason="pip install 'fsa_compile[models]'")
    torch.manual_seed(0)
    model = nsa.SparseAttention(
        dim=128, dim_head=32, heads=4, kv_heads=2, causal=True, sliding_window_size=32, compress_block_size=16,
        compress_block_sliding_stride=8, selection_block_size=16, num_selected_blocks=4,
    ).cuda()  # fmt: skip
    for p in model.parameters():
        if p.dim() == 1 or not p.any():
            torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 512, 128, device="cuda")
    got = outcome(compiled(model, inner="aot_eager"), model, x)
    assert roles() == ROLES
    worst = errors(got, outcome(model, model, x))
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minimax_m3(attention):
    reason = "pip install 'fsa_compile[models]' (transformers 5.23)"
    mm = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl", reason=reason)
    mc = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl", reason=reason)
    torch.manual_seed(0)
    config = mc.MiniMaxM3VLTextConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=128, index_n_heads=2, index_head_dim=32, index_block_size=16, index_topk_blocks=4, index_local_blocks=1,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config._attn_implementation = attention
    model = mm.MiniMaxM3VLTextModel(config).cuda()
    ids = torch.randint(0, 128, (2, 512), device="cuda")
    run = dict(input_ids=ids, use_cache=False, pick=lambda out: out.last_hidden_state)
    got = outcome(compiled(model, inner="aot_eager"), model, **run)
    assert roles() == ["selected", "selected"]
    worst = errors(got, outcome(model, model, **run))
    assert max(worst.values()) < TOLERANCE, worst
