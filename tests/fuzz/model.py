"""A whole model as text: projections or given heads, one to three branches, a gate; and the ways to get it wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fuzz import compression, dense, gathered, windows
from fuzz.choices import Answer, Option, Source
from fuzz.masks import band, causal, positions, selected_tokens, Term
from fuzz.selection import select

HEADER = '''\
import math

import torch
import torch.nn.functional as F
from torch import nn

{sizes}
HQ = HKV * G


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{setup}

    def forward(self, {arguments}):
{body}


def inputs(generator, N=N):
    def normal(*size):
        return torch.randn(size, generator=generator)

    def integers(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    return {{
{inputs}
    }}
'''


@dataclass(frozen=True)
class Model:
    """One generated model.

    Args:
        source: Its text: a class `Model` and a function `inputs(generator, N)`, plain PyTorch.
        trail: The decisions that led to it.
        branches: Its attention branches in the order of the text, one site each: "selected", "compressed", "window".
        slips: Names of the mutants that can be made of it.
        mutant: The slip that it has, or None if it is right.
    """

    source: str
    trail: Mapping[str, Option]
    branches: tuple[str, ...]
    slips: tuple[str, ...]
    mutant: str | None = None

    @property
    def mutant_made(self) -> bool:
        """Whether the slip is one that these decisions allow."""
        return self.mutant in self.slips

    @property
    def dtype(self) -> str:
        """"float32", "float64" or "bfloat16"."""
        return str(self.trail["dtype"])

    @property
    def dynamic(self) -> str:
        """"static", "mark" (the length is marked) or "all" (`dynamic=True`)."""
        return str(self.trail["dynamic"])

    @property
    def grad(self) -> bool:
        """Whether gradients are wanted."""
        return self.trail["grad"] == "grad"

    def __repr__(self) -> str:
        return f"trail = {dict(self.trail)}\nmutant = {self.mutant!r}\n\n{self.source}"


def generate(answer: Answer, mutant: str | None = None) -> Model:
    """Write one model.

    Args:
        answer: Takes the decisions.
        mutant: A slip to make, one of `slips` of the same model without it.
    """
    s = Source(answer, mutant)
    layout = str(s.pick("layout", "bhnd", "bnhd", "thd", "kt", "folded"))
    s.grad = s.pick("grad", "grad", "grad", "no_grad") == "grad"
    sizes(s, layout)
    branches = tuple(str(s.pick("branches", *BRANCHES)).split("+"))
    projections(s, layout)
    for branch in branches:
        with s.scope(branch):
            WRITERS[branch](s, layout)
    combine(s, branches)
    exact = "selected.scores" not in s.trail or s.trail["selected.scores"] == "list"
    # In bfloat16 a rounding error may change a top-k, so only given lists have something to compare.
    s.pick("dtype", "float32", "float32", "float32", "float64", *(("bfloat16",) if exact else ()))
    s.pick("dynamic", *("static",) * 6, "mark", "all")  # Symbolic sizes cost several times as much.
    text = HEADER.format(
        sizes="\n".join(f"{name} = {value}" for name, value in s.sizes.items()),
        setup=indent(s.setup or ["pass"], 8),
        arguments=", ".join(s.inputs),
        body=indent(s.body, 8),
        inputs=indent([f'"{name}": {value},' for name, value in s.inputs.items()], 8),
    )
    return Model(text, s.trail, branches, tuple(s.slips), mutant)


ONE_BRANCH = ("selected", "window", "compressed")
SEVERAL_BRANCHES = ("compressed+selected", "selected+window", "compressed+selected+window")
BRANCHES = ("selected", *ONE_BRANCH, *SEVERAL_BRANCHES)


def indent(lines: list[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)


def sizes(s: Source, layout: str) -> None:
    """Small numbers. A list covers at most a quarter of the blocks, so that a mutant has room to differ."""
    length, block = {"32/4": (32, 4), "64/8": (64, 8), "48/4": (48, 4), "96/8": (96, 8)}[
        str(s.pick("lengths", "32/4", "64/8", "48/4", "96/8"))
    ]
    s.sizes["BATCH"] = 1 if layout == "thd" else int(s.pick("batch", 2, 1))
    s.sizes["N"] = length
    s.sizes["HKV"] = int(s.pick("kv_heads", 2, 1, 3))
    s.sizes["G"] = int(s.pick("group", 2, 1, 3))
    s.sizes["D"] = int(s.pick("head_dim", 8, 16))
    s.sizes["DV"] = int(s.pick("value_dim", 8, 12)) if s.sizes["D"] == 8 else 16
    s.sizes["DIM"] = 20
    s.sizes["BLOCK"] = block
    s.sizes["TOP"] = int(s.pick("top", 2, 3)) if length // block >= 12 else 2
    s.sizes["WINDOW"] = int(s.pick("window_size", 8, 5, 7))
    s.sizes["CHUNK"] = int(s.pick("chunk_size", 8, 16))
    s.sizes["STRIDE"] = int(s.pick("stride", 4, 8))
    s.sizes["KERNEL"] = s.sizes["STRIDE"] * int(s.pick("kernel", 2, 1))


def projections(s: Source, layout: str) -> None:
    """`q`, `k`, `v` in the layout, from `x` or as inputs; `b` and `n`."""
    packed = layout == "thd"
    s.input("x", "normal(N, DIM)" if packed else "normal(BATCH, N, DIM)")
    entry = s.pick("entry", "heads", "projections")
    given = {
        "bhnd": "normal(BATCH, {h}, N, {d})",
        "bnhd": "normal(BATCH, N, {h}, {d})",
        "thd": "normal(N, {h}, {d})",
        "kt": "normal(BATCH, {h}, N, {d})",
        "folded": "normal(BATCH * {h}, N, {d})",
    }[layout]
    head_sizes = (("q", "HQ", "D"), ("k", "HKV", "D"), ("v", "HKV", "DV"))
    if entry == "heads":
        for name, h, d in head_sizes:
            s.input(name, "normal(BATCH, HKV, D, N)" if layout == "kt" and name == "k" else given.format(h=h, d=d))
    if packed:
        s.let("b, n", "1, x.shape[0]")
    else:
        s.let("b, n", "x.shape[0], x.shape[1]")
    if entry == "heads":
        return
    for name, h, d in head_sizes:
        s.init(f"self.to_{name} = nn.Linear(DIM, {h} * {d}, bias=False)")
        s.let(name, f"self.to_{name}(x).unflatten(-1, ({h}, {d}))")
    between = s.pick("between", "nothing", "rms_norm", "rotary", "layer_norm")
    if between == "rms_norm":
        s.init("self.q_norm = nn.RMSNorm(D)")
        s.init("self.k_norm = nn.RMSNorm(D)")
        s.let("q, k", "self.q_norm(q), self.k_norm(k)")
    elif between == "layer_norm":
        s.init("self.k_norm = nn.LayerNorm(D)")
        s.let("k", "self.k_norm(k)")
    elif between == "rotary":
        s.let("angle", "torch.arange(n)[:, None, None] * 10.0 ** -torch.arange(0, 1, 2 / D)")
        s.let("cos, sin", "angle.cos().to(q.dtype), angle.sin().to(q.dtype)")
        for name in ("q", "k"):
            s.let("even, odd", f"{name}.chunk(2, dim=-1)")
            s.let(name, "torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)")
    for name, _, _ in head_sizes:
        if layout in ("bhnd", "kt", "folded"):
            s.let(name, f"{name}.transpose(1, 2)")
        if layout == "kt" and name == "k":
            s.let(name, f"{name}.mT")
        if layout == "folded":
            s.let(name, f"{name}.flatten(0, 1)")


def selected(s: Source, layout: str) -> None:
    """The selected branch; writes `selected`."""
    gather = s.pick("form", "dense", "dense", "gather") == "gather"
    order = str(s.pick("head_order", "interleave", "interleave", "tile"))
    dense.to_bhnd(s, layout)
    positions(s, "i", "n")
    selection = select(s, order=order, gathered=gather)
    if gather:
        gathered.attention(s, selection, order=order, out="selected")
        return
    positions(s, "j", "n")
    tokens = selected_tokens(s, "tokens", padding=selection.padding)
    if selection.own == "joined":
        s.let("own", "(i // BLOCK)[:, None] == j // BLOCK")
        s.let("tokens", s.slip("own_dropped", f"{tokens} | own", f"{tokens} & own", f"{tokens} | own.roll(1, 0)"))
    terms = [Term("tokens", selection.heads)]
    if selection.rule == "causal":
        # Then only whole past blocks are listed, or in the first rows, by chance, others.
        redundant = selection.own == "out"
        with s.redundant(redundant):
            terms.append(Term(causal(s, "not_later"), redundant=redundant))
    elif selection.rule == "diagonal":
        s.let("inside", s.slip("causal", "j <= i[:, None]", "j <= i[:, None] + 1"))
        terms.append(Term(s.let("not_later", "((i // BLOCK)[:, None] != j // BLOCK) | inside")))
    native(s, layout, order, terms, empty=selection.own == "out", out="selected")


def native(s: Source, layout: str, order: str, terms: list[Term], *, empty: bool, out: str) -> None:
    dense.attention(s, "q", "k", "v", layout=layout, order=order, terms=terms, empty=empty, out=out)


def window(s: Source, layout: str) -> None:
    """The window branch; writes `window`."""
    form = str(s.pick("form", "band", "band", *windows.SPELLINGS))
    order = str(s.pick("head_order", "interleave", "interleave", "tile"))
    if form == "band":
        positions(s, "i", "n")
        positions(s, "j", "n")
        native(s, layout, order, [Term(band(s, "near"))], empty=False, out="window")
    else:
        dense.to_bhnd(s, layout)
        windows.attention(s, form, order=order, out="window")


def compressed(s: Source, layout: str) -> None:
    """The compressed branch; writes `compressed`."""
    kind = str(s.pick("kind", *compression.KINDS))
    count = int(s.pick("memory_tokens", 0, 1, 2))
    order = str(s.pick("head_order", "interleave", "interleave", "tile"))
    dense.to_bhnd(s, layout)
    positions(s, "i", "n")
    compression.compress(s, kind)
    kernel = "KERNEL" if kind in ("avg_pool", "strided_mean", "unfold_weighted", "conv") else "STRIDE"
    compression.visible(s, "complete", count, kernel=kernel)
    compression.prefix(s, count)
    s.let("kc", dense.in_layout("kc", layout, keys=True))
    s.let("vc", dense.in_layout("vc", layout))
    dense.attention(
        s, "q", "kc", "vc", layout=layout, order=order, terms=[Term("complete")], empty=count == 0, out="compressed"
    )


WRITERS = {"selected": selected, "window": window, "compressed": compressed}


def combine(s: Source, branches: tuple[str, ...]) -> None:
    """The branches (..., n, HQ, DV) under their gates, and the output projection."""
    count = len(branches)
    gate = s.pick("gate", "none", "sigmoid", "sigmoid_token", "scalar", *(("softmax",) if count > 1 else ()))
    factors = ["{}"] * count
    if gate in ("sigmoid", "softmax"):
        s.init(f"self.to_gates = nn.Linear(DIM, HQ * {count})")
        s.let("gates", f"self.to_gates(x).unflatten(-1, (HQ, {count})).{'sigmoid()' if gate == 'sigmoid' else 'softmax(-1)'}")
        factors = [f"{{}} * gates[..., {number}, None]" for number in range(count)]
    elif gate == "sigmoid_token":
        s.init(f"self.to_gates = nn.Linear(DIM, {count})")
        s.let("gates", "torch.sigmoid(self.to_gates(x))")
        factors = [f"{{}} * gates[..., {number}, None, None]" for number in range(count)]
    elif gate == "scalar":
        s.init(f"self.gates = nn.Parameter(torch.rand({count}) + 0.5)")
        factors = [f"{{}} * self.gates[{number}]" for number in range(count)]
    if count > 1:
        factors[0] = s.slip("gate", factors[0], f"2 * {factors[0]}")
    s.let("y", " + ".join(factor.format(branch) for factor, branch in zip(factors, branches, strict=True)))
    s.let("y", "y.flatten(-2)")
    if s.pick("output", "none", "linear") == "linear":
        s.init("self.to_out = nn.Linear(HQ * DV, DIM)")
        s.let("y", "self.to_out(y)")
    s.body.append("return y")
