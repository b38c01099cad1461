"""The ops as PyTorch sees them: schema, fakes, autograd, autocast, compilation, memory, reproducibility."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops_oracle import NAMES, Problem, problem, relative_error, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsa_compile.kernels import cpu, cpu_selected, ops
from fsa_compile.kernels.cpu_plan import plan_tiles

OPS = ("selected_attention", "compressed_attention", "sliding_window_attention")


def variants(name: str) -> Iterator[Problem]:
    """The problems that take different ways through fakes and autograd."""
    yield problem(name, b=2, n=12, m=20, dk=8, dv=4)
    yield problem(name, b=2, n=12, m=20, dk=8, dv=4, q_offset=3, q_offsets=torch.tensor([1, 8]))
    yield problem(name, b=1, n=9, m=9, dk=8, dv=8, q_offset=2).to(torch.bfloat16)
    p = problem(name, b=1, n=8, m=8, dk=4, dv=4)
    yield Problem(name, p.q.transpose(1, 2).contiguous().transpose(1, 2), p.k[..., :1].expand_as(p.k), p.v, p.arguments)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fakes against real runs (dtype, shape, strides), AOTAutograd with symbolic shapes."""
    for p in variants(name):
        operands = tuple(x.detach().requires_grad_() for x in (p.q, p.k, p.v))
        torch.library.opcheck(p.op, operands, p.arguments)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_backward(name: str) -> None:
    for p in variants(name):
        out, lse = p.op(p.q, p.k, p.v, **p.arguments)
        indices = [p.arguments["indices"]] if name == "selected_attention" else []
        keywords = {key: value for key, value in p.arguments.items() if key != "indices"}
        for dlse in (None, torch.ones_like(lse)):
            arguments = (torch.ones_like(out), dlse, p.q, p.k, p.v, out, lse, *indices)
            torch.library.opcheck(getattr(ops, f"{name}_backward"), arguments, keywords)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name: str) -> None:
    """Numerical derivatives of out and lse; every row sees a key, -inf having no difference quotient."""
    p = problem(name, b=1, hq=2, hkv=1, n=5, m=7, dk=3, dv=2, **({"block_size": 3} if name == "selected_attention" else {}))
    if name == "selected_attention":
        p.arguments["indices"][..., 0] = 0
    if name == "compressed_attention":
        p = p.with_arguments(prefix=1)
    operands = tuple(x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    assert torch.autograd.gradcheck(lambda q, k, v: p.op(q, k, v, **p.arguments), operands)


@pytest.mark.parametrize("name", OPS)
def test_gradient_of_one_output_alone(name: str) -> None:
    p = problem(name)
    for pick in (0, 1):
        results = []
        for function in (p.op, p.oracle):
            operands = tuple(x.detach().requires_grad_() for x in (p.q, p.k, p.v))
            result = function(*operands, **p.arguments)[pick]
            loss = result.masked_fill(result == -torch.inf, 0.0).square().sum()
            results.append(torch.autograd.grad(loss, operands, allow_unused=True))
        for mine, exact in zip(*results):
            exact = torch.zeros_like(mine) if exact is None else exact
            torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused(name: str) -> None:
    p = problem(name, b=2, n=8, m=8)
    q = p.q.detach().requires_grad_()
    (grad,) = torch.autograd.grad(p.op(q, p.k, p.v, **p.arguments)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_poisoned_memory_does_not_show(name: str) -> None:
    """Fresh memory is filled with NaN, so a row that nobody writes would show."""
    p = problem(name)
    expected = run(p.op, p)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        result = run(p.op, p)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(result[key], expected[key]) for key in NAMES)


@pytest.mark.parametrize("name", OPS)
def test_two_runs_are_bitwise_equal(name: str) -> None:
    p = problem(name, n=200, m=200).to(torch.float32)
    first, second = run(p.op, p), run(p.op, p)
    assert all(torch.equal(first[key], second[key]) for key in NAMES)


@pytest.mark.parametrize("name", OPS)
def test_autocast_narrows_nothing_inside(name: str) -> None:
    p = problem(name).to(torch.float32)
    expected = run(p.op, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(p.op, p)
    assert all(result[key].dtype == torch.float32 and torch.equal(result[key], expected[key]) for key in NAMES)


@pytest.mark.parametrize("name", OPS)
def test_one_graph_serves_all_lengths_under_compile(name: str) -> None:
    """No graph break, no recompilation when the sequence grows, and the results of eager mode."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    for backend in (count, "aot_eager"):
        compiled = None
        for n in (24, 40, 56):
            p = problem(name, n=n, m=n)
            compiled = compiled or torch.compile(p.op, backend=backend, dynamic=True, fullgraph=True)
            result, expected = run(compiled, p), run(p.op, p)
            for key in NAMES:
                torch.testing.assert_close(result[key], expected[key], rtol=0, atol=0)
    assert len(graphs) == 1


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that anything returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("hot", [False, True], ids=["spread", "one block in every list"])
def test_no_n_by_n_buffer(hot: bool) -> None:
    n = 4096
    p = problem("selected_attention", b=1, hq=2, hkv=1, n=n, m=n, block_size=64, t=8).to(torch.float32)
    indices = torch.zeros_like(p.arguments["indices"]) if hot else p.arguments["indices"]
    band = cpu.sliding_window_band(n, n, 128, 0, None)
    compressed = cpu.compressed_band(n, n // 2, 2, 1, 0, 0, None)
    with torch.no_grad(), _Largest() as largest:
        out, lse = cpu_selected.selected_attention_forward(p.q, p.k, p.v, indices, 64, 0.25, "causal", 0, None)
        cpu_selected.selected_attention_backward(out, lse, p.q, p.k, p.v, out, lse, indices, 64, 0.25, "causal", 0, None)
        for each in (band, compressed):
            m = p.k.shape[2] if each is band else n // 2
            out, lse = cpu.banded_attention_forward(p.q, p.k[:, :, :m], p.v[:, :, :m], each, 0.25)
            cpu.banded_attention_backward(out, lse, p.q, p.k[:, :, :m], p.v[:, :, :m], out, lse, each, 0.25)
    assert largest.elements <= n * n // 4


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_tiles_are_bounded_whatever_the_lists_are(rows: int, exact: bool) -> None:
    heads, n, t, block_size = 2, 256, 4, 8
    positions = torch.arange(n)[None].expand(heads, -1)
    spread = torch.randint(0, n // block_size, (heads, n, t), generator=torch.Generator().manual_seed(0))
    for indices in (torch.zeros_like(spread), spread, torch.full_like(spread, -1)):
        plan = plan_tiles(indices, positions, block_size, n, "causal", rows, exact)
        assert len(plan.block) <= heads * n * t // rows + heads * n // block_size
        entries = (plan.row < heads * n).nonzero()
        listed = {(int(plan.row[i, j]), int(plan.block[i])) for i, j in entries}
        numbers = torch.cartesian_prod(torch.arange(heads), torch.arange(n)).tolist()
        expected = {(h * n + i, j) for h, i in numbers for j in indices[h, i].tolist() if 0 <= j * block_size <= i}
        assert listed == expected and len(entries) == len(expected)
