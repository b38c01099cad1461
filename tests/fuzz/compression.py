"""Spellings of compressed keys and of their causal rule."""

from __future__ import annotations

from fuzz.choices import Source

KINDS = ("mean", "linear", "avg_pool", "weighted", "strided_mean", "unfold_weighted", "slices", "conv")


def compress(s: Source, kind: str) -> None:
    """`kc`, `vc` (b, HKV, c, d) from `kh`, `vh`, with the memory tokens in front."""
    for source, name, size in (("kh", "kc", "D"), ("vh", "vc", "DV")):
        blocks = f"{source}.unflatten(2, (n // STRIDE, STRIDE))"
        if kind == "mean":
            s.let(name, f"{blocks}.mean(3)")
        elif kind == "linear":
            s.init(f"self.to_{name} = nn.Linear(STRIDE * {size}, {size})")
            s.init(f"self.place_{name} = nn.Parameter(0.1 * torch.randn(HKV, STRIDE, {size}))")
            s.let(name, f"self.to_{name}(({blocks} + self.place_{name}[:, None]).flatten(3))")
        elif kind == "avg_pool":
            s.let(name, f"F.avg_pool1d({source}.flatten(0, 1).mT, KERNEL, STRIDE).mT.unflatten(0, (b, HKV))")
        elif kind == "weighted":
            s.init(f"self.weight_{name} = nn.Parameter(torch.randn(STRIDE))")
            s.let(name, f'torch.einsum("bhcld,l->bhcd", {blocks}, self.weight_{name}.softmax(0))')
        elif kind == "strided_mean":
            s.let(name, f"{source}.unfold(2, KERNEL, STRIDE).mean(-1)")
        elif kind == "unfold_weighted":
            s.init(f"self.weight_{name} = nn.Parameter(torch.randn(KERNEL))")
            s.let(name, f"{source}.unfold(2, KERNEL, STRIDE) @ self.weight_{name}")
        elif kind == "slices":
            s.let(name, f"torch.stack([{source}[:, :, off::STRIDE] for off in range(STRIDE)], dim=3).mean(3)")
        else:
            s.init(f"self.conv_{name} = nn.Conv1d({size}, {size}, KERNEL, STRIDE, groups={size})")
            s.let(name, f"self.conv_{name}({source}.flatten(0, 1).mT).mT.unflatten(0, (b, HKV))")
    s.let("c", "kc.shape[2]")


def prefix(s: Source, count: int) -> None:
    """`count` learned tokens in front of `kc`, `vc`."""
    if not count:
        return
    spelling = s.pick("memory", "expand", "repeat")
    for name, size in (("kc", "D"), ("vc", "DV")):
        s.init(f"self.memory_{name} = nn.Parameter(torch.randn(HKV, {count}, {size}))")
        copies = "expand(b, -1, -1, -1)" if spelling == "expand" else "unsqueeze(0).repeat(b, 1, 1, 1)"
        s.let(name, f"torch.cat([self.memory_{name}.{copies}, {name}], dim=2)")


def visible(s: Source, name: str, count: int, *, kernel: str) -> str:
    """``(n, count + c)``: compressed key j is complete at query i, or a memory token.

    The rule "complete" is ``i >= j*STRIDE + l - 1``; "strict" is one token later.
    """
    rule = str(s.pick("rule", "complete", "strict"))
    s.let("ends", f"torch.arange(c) * STRIDE + {kernel} - 1")
    spelling = s.pick("mask", "ends", "blocks", "difference") if kernel == "STRIDE" else s.pick("mask", "ends", "difference")
    shift = {"complete": "", "strict": " + 1"}[rule]
    other = {"complete": (" + 1", " - 1"), "strict": ("", " + 2")}[rule]
    if spelling == "blocks":
        # Whole blocks before the query: strict counts its own token out.
        base = {"complete": "(i + 1) // STRIDE", "strict": "i // STRIDE"}[rule]
        wrong = {"complete": "i // STRIDE", "strict": "(i + 1) // STRIDE"}[rule]
        text = f"torch.arange(c) < ({s.slip('causal', base, wrong, '(i + 2) // STRIDE')})[:, None]"
    elif spelling == "difference":
        text = f"(i[:, None] - (ends{s.slip('causal', shift, *other)})) >= 0"
    else:
        text = f"ends[None, :]{s.slip('causal', shift, *other)} <= i[:, None]"
    s.let(name, text)
    if count:
        how = s.pick("prefix_mask", "pad", "cat", "ones")
        if how == "pad":
            s.let(name, f"F.pad({name}, ({count}, 0), value=True)")
        elif how == "cat":
            s.let(name, f"torch.cat([torch.ones(n, {count}, dtype=torch.bool), {name}], dim=1)")
        else:
            s.let(name, f"torch.cat([torch.ones_like({name}[:, :1]).expand(-1, {count}), {name}], dim=-1)")
    return name
