"""Attention over all keys with a mask: q, k, v in some layout, some spelling of heads, mask, softmax and product.

Layouts of q (k and v with `HKV` heads): "bhnd" (b, h, n, d); "bnhd" (b, n, h, d); "thd" (n, h, d); "kt" as "bhnd" but k is
(b, h, d, n); "folded" (b*h, n, d). Results come back as (b, n, h, d), in "thd" as (n, h, d).
"""

from __future__ import annotations

from fuzz.choices import Source
from fuzz.masks import Term

HEAD_AXIS = {"bhnd": 1, "bnhd": 2, "thd": 1, "kt": 1, "folded": 0}

TO_LAYOUT = {
    "bhnd": "{0}",
    "bnhd": "{0}.transpose(1, 2)",
    "thd": "{0}[0].transpose(0, 1)",
    "kt": "{0}.transpose(-1, -2)",
    "folded": "{0}.flatten(0, 1)",
}
"""From (b, h, n, d). For "kt" only k is transposed."""

TO_ROWS = {
    "bhnd": "{0}.transpose(1, 2)",
    "bnhd": "{0}",
    "thd": "{0}",
    "kt": "{0}.transpose(1, 2)",
    "folded": "{0}.unflatten(0, (b, HQ)).transpose(1, 2)",
}
"""From a layout to the order of the output."""

TO_BHND = {
    "bhnd": "{0}",
    "bnhd": "{0}.transpose(1, 2)",
    "thd": "{0}.transpose(0, 1)[None]",
    "kt": "{0}",
    "folded": "{0}.unflatten(0, (b, {1}))",
}


def in_layout(name: str, layout: str, *, keys: bool = False) -> str:
    """The expression that brings `name` (b, h, n, d) into a layout."""
    return TO_LAYOUT["bhnd" if layout == "kt" and not keys else layout].format(name)


def to_bhnd(s: Source, layout: str) -> None:
    """Write `qh`, `kh`, `vh` (b, h, n, d) from `q`, `k`, `v` in a layout."""
    for name, heads in (("q", "HQ"), ("k", "HKV"), ("v", "HKV")):
        s.let(name + "h", "k.mT" if layout == "kt" and name == "k" else TO_BHND[layout].format(name, heads))


def attention(
    s: Source, q: str, k: str, v: str, *, layout: str, order: str, terms: list[Term], empty: bool, out: str
) -> str:
    """Masked attention of all queries over all of k, v. Gives the name of the result, in the output's order.

    Args:
        s: Where to write.
        q: Name of the queries, in `layout`; k and v likewise.
        k: Keys.
        v: Values.
        layout: See the module's docstring.
        order: "interleave" (query head h reads key head h // G) or "tile" (h % HKV).
        terms: Masks that must all hold.
        empty: Whether a query may see no key; its result has to be zero.
        out: Name of the result.
    """
    fused = s.pick("product", "softmax", "softmax", "sdpa") == "sdpa"
    space = group(s, q, k, v, layout=layout, order=order, fused=fused)
    terms = [fit(s, term, space, layout=layout, order=order) for term in terms]
    if fused:
        sdpa(s, space, terms, layout=layout, empty=empty, out=out)
    else:
        by_hand(s, space, terms, layout=layout, empty=empty, out=out)
    return s.let(out, TO_ROWS[layout if not fused or layout != "bnhd" else "bhnd"].format(out))


def group(s: Source, q: str, k: str, v: str, *, layout: str, order: str, fused: bool) -> str:
    """Let every query head meet its key head: copies of k and v, or a group axis. Writes `qs`, `ks`, `vs`.

    Returns:
        Where the heads stand afterwards: "heads" (one axis), "kg" (HKV, G), "gk" (G, HKV) or "native" (left to SDPA).
    """
    s.let("qs", q)
    if order == "interleave":
        options = ["repeat_interleave", "expand", "grouped"]
        options += ["index"] if layout != "folded" else []
        if fused:
            options.remove("grouped")
            options += ["enable_gqa"] if layout != "folded" else []
    else:
        options = ["tile", "tile_cat", "expand_front"] + (["grouped"] if not fused and layout != "folded" else [])
    spelling = s.pick("gqa", *options)
    for name, source, slipping in (("ks", k, "k"), ("vs", v, "v")):
        s.let(name, roll(s, source, layout) if slipping == "v" else source)
        if spelling in ("grouped", "enable_gqa"):
            continue
        copied = repeat(s, name, layout, str(spelling))
        if s.sizes["HKV"] > 1 and s.sizes["G"] > 1:  # Otherwise the two orders are the same.
            other = repeat(s, name, layout, "tile" if order == "interleave" else "repeat_interleave")
            copied = s.slip(f"head_order_{slipping}", copied, other)
        s.let(name, copied)
    if spelling == "enable_gqa":
        return "native"
    if spelling != "grouped":
        return "heads"
    if layout == "folded":
        s.let("qs", "qs.unflatten(0, (b * HKV, G))")
        return "kg"
    s.let("qs", f"qs.unflatten({HEAD_AXIS[layout]}, {'(HKV, G)' if order == 'interleave' else '(G, HKV)'})")
    return "kg" if order == "interleave" else "gk"


def roll(s: Source, v: str, layout: str) -> str:
    axis = {"bhnd": 2, "bnhd": 1, "thd": 0, "kt": 2, "folded": 1}[layout]
    return s.slip("values", v, f"{v}.roll(1, {axis})", *s.detached(v))


def repeat(s: Source, name: str, layout: str, spelling: str) -> str:
    """Each key head copied for its query heads, as an expression."""
    axis = HEAD_AXIS[layout]
    rank = 3 if layout in ("thd", "folded") else 4
    sizes = ["-1"] * (rank + 1)
    if spelling == "repeat_interleave":
        return f"{name}.repeat_interleave(G, {axis})"
    if spelling == "expand":
        sizes[axis + 1] = "G"
        return f"{name}.unsqueeze({axis + 1}).expand({', '.join(sizes)}).flatten({axis}, {axis + 1})"
    if spelling == "index":
        return f"{name}.index_select({axis}, torch.arange(HQ) // G)"
    if layout == "folded":
        return f"{name}.unflatten(0, (b, HKV)).repeat(1, G, 1, 1).flatten(0, 1)"
    if spelling == "tile":
        sizes = ["1"] * rank
        sizes[axis] = "G"
        return f"{name}.repeat({', '.join(sizes)})"
    if spelling == "tile_cat":
        return f"torch.cat([{name}] * G, {axis})"
    sizes[axis] = "G"
    return f"{name}.unsqueeze({axis}).expand({', '.join(sizes)}).flatten({axis}, {axis + 1})"


def fit(s: Source, term: Term, space: str, *, layout: str, order: str) -> Term:
    """A mask (b, heads, n, m) brought to the axes of the logits; a mask (n, m) broadcasts as it is."""
    if not term.heads:
        return term
    name = term.name
    if s.sizes["HKV"] > 1 or (term.heads == "q" and s.sizes["G"] > 1):
        s.let(name, s.slip("mask_of_other_head", name, f"{name}.roll(1, 1)"))
    if term.heads == "kv":
        if space in ("heads", "native"):
            options = ("repeat_interleave", "expand") if order == "interleave" else ("tile", "tile_cat", "expand_front")
            spelling = s.pick("mask_heads", *options)
            s.let(name, repeat(s, name, "bhnd", str(spelling)))
        else:
            s.let(name, f"{name}.unsqueeze({2 if space == 'kg' else 1})")
    elif space in ("kg", "gk"):
        s.let(name, f"{name}.unflatten(1, {'(HKV, G)' if space == 'kg' else '(G, HKV)'})")
    if layout == "thd":
        s.let(name, f"{name}[0]")
    if layout == "folded":
        s.let(name, f"{name}.flatten(0, 1)")
    return Term(name, term.heads, term.redundant)


def by_hand(s: Source, space: str, terms: list[Term], *, layout: str, empty: bool, out: str) -> None:
    """Logits, mask, softmax, product: everything spelled out. Writes `out` in the layout."""
    into, back = EINSUM[layout, space]
    scale(s)
    if (layout, space) in MATMUL and s.pick("contraction", "matmul", "einsum") == "matmul":
        s.let("logits", MATMUL[layout, space])
    else:
        s.let("logits", f'torch.einsum("{into}", qs, ks)')
    scale_logits(s)
    p = probabilities(s, terms, empty=empty)
    if space == "heads" and layout in ("bhnd", "kt", "folded") and s.pick("product_v", "matmul", "einsum") == "matmul":
        s.let(out, f"{p} @ vs")
    else:
        s.let(out, f'torch.einsum("{back}", {p}, vs)')
    if space in ("kg", "gk"):
        s.let(out, f"{out}.flatten({HEAD_AXIS[layout]}, {HEAD_AXIS[layout] + 1})")


MATMUL = {
    ("bhnd", "heads"): "qs @ ks.transpose(-1, -2)",
    ("kt", "heads"): "qs @ ks",
    ("folded", "heads"): "torch.bmm(qs, ks.mT)",
    ("bnhd", "heads"): "qs.transpose(1, 2) @ ks.permute(0, 2, 3, 1)",
    ("bhnd", "kg"): "qs @ ks.unsqueeze(2).mT",
    ("folded", "kg"): "qs @ ks.unsqueeze(1).mT",
}
"""The logits without einsum, where that is natural."""

EINSUM = {
    ("bhnd", "heads"): ("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    ("bnhd", "heads"): ("bihd,bjhd->bhij", "bhij,bjhd->bihd"),
    ("thd", "heads"): ("ihd,jhd->hij", "hij,jhd->ihd"),
    ("kt", "heads"): ("bhid,bhdj->bhij", "bhij,bhjd->bhid"),
    ("folded", "heads"): ("fid,fjd->fij", "fij,fjd->fid"),
    ("bhnd", "kg"): ("bkgid,bkjd->bkgij", "bkgij,bkjd->bkgid"),
    ("bnhd", "kg"): ("bikgd,bjkd->bkgij", "bkgij,bjkd->bikgd"),
    ("thd", "kg"): ("ikgd,jkd->kgij", "kgij,jkd->ikgd"),
    ("kt", "kg"): ("bkgid,bkdj->bkgij", "bkgij,bkjd->bkgid"),
    ("folded", "kg"): ("fgid,fjd->fgij", "fgij,fjd->fgid"),
    ("bhnd", "gk"): ("bgkid,bkjd->bgkij", "bgkij,bkjd->bgkid"),
    ("bnhd", "gk"): ("bigkd,bjkd->bgkij", "bgkij,bjkd->bigkd"),
    ("thd", "gk"): ("igkd,jkd->gkij", "gkij,jkd->igkd"),
    ("kt", "gk"): ("bgkid,bkdj->bgkij", "bgkij,bkjd->bgkid"),
}
"""Logits and product for each layout and place of the heads."""


def scale(s: Source) -> None:
    """Where the scale stands; writes it if that is on q or k, and remembers it for `scale_logits` otherwise."""
    spelling = s.pick("scale", "logits", "q", "k", "both", "divide", "none", "parameter", "parameter_logits", "q_times_input")
    if spelling == "q":
        s.let("qs", "qs * " + s.slip("scale", "D**-0.5", "D**-1.0", "1.0"))
    elif spelling == "k":
        s.let("ks", "ks * " + s.slip("scale", "(1 / math.sqrt(D))", "(1 / D)"))
    elif spelling == "both":
        s.let("qs", "qs * D**-0.25")
        s.let("ks", "ks" + s.slip("scale", " * D**-0.25", ""))
    elif spelling == "parameter":
        own = "temperature_" + s.identifier()
        s.init(f"self.{own} = nn.Parameter(torch.tensor(0.3))")
        s.let("qs", "qs * " + s.slip("scale", f"self.{own}", f"self.{own} ** 2", *s.detached(f"self.{own}")))
    elif spelling == "q_times_input":
        s.let("qs", "qs * " + s.slip("scale", "x.mean().exp() / D", "x.mean().exp()"))


def scale_logits(s: Source) -> None:
    spelling = s.trail[s.full("scale")]
    if spelling == "logits":
        s.let("logits", "logits * " + s.slip("scale", "D**-0.5", "D**-1.0"))
    elif spelling == "divide":
        s.let("logits", "logits / " + s.slip("scale", "math.sqrt(D)", "D"))
    elif spelling == "parameter_logits":
        own = "temperature_" + s.identifier()
        s.init(f"self.{own} = nn.Parameter(torch.tensor(0.3))")
        s.let("logits", "logits * " + s.slip("scale", f"self.{own}", f"self.{own} ** 2", *s.detached(f"self.{own}")))
    sloped = "logits - 0.3 * torch.arange(logits.shape[-1]).to(logits.dtype)"
    odd = s.slip("logits", "", "logits.abs()", sloped, "logits.relu().clone()")
    if odd:
        s.let("logits", odd)


def probabilities(s: Source, terms: list[Term], *, empty: bool) -> str:
    """`logits` masked and normalised over the last axis; gives the name of the result.

    Where rows may be empty the fill is finite and the probabilities of such rows are made zero afterwards: with -inf the row
    would be NaN, forward or backward.
    """
    if not terms:
        softmax(s)
        return "p"
    fill = fill_value(s, finite=empty)
    spellings = ["masked_fill", "where", "additive", "additive_where", "inverted"]
    # On what einsum returns itself, torch cannot trace a write (its own backends fail as well).
    spellings += ["in_place"] if s.trail[s.full("scale")] in ("logits", "divide", "parameter_logits") else []
    spellings += ["sequential"] if len(terms) > 1 else []
    # Times zero, an infinite penalty would be NaN.
    spellings += ["penalty"] if "inf" not in fill or "finfo" in fill else []
    spelling = s.pick("apply", *spellings)
    s.let("visible", " & ".join(term.name for term in terms))
    if spelling not in ("inverted", "sequential"):
        flip_mask(s)
    if spelling == "masked_fill":
        s.let("logits", f"logits.masked_fill(~visible, {fill})")
    elif spelling == "in_place":
        s.body.append(f"logits.masked_fill_(visible.logical_not(), {fill})")
    elif spelling == "where":
        s.let("logits", f"torch.where(visible, logits, {fill})")
    elif spelling == "additive":
        s.let("bias", "torch.zeros(visible.shape, dtype=logits.dtype)")
        s.let("logits", f"logits + bias.masked_fill(~visible, {fill})")
    elif spelling == "additive_where":
        s.let("logits", f"logits + torch.where(visible, torch.zeros((), dtype=logits.dtype), {fill})")
    elif spelling == "inverted":
        s.let("hidden", " | ".join(f"~{term.name}" for term in terms))
        dropped = s.slip("hidden", "hidden", "hidden.roll(1, -1)", "hidden.logical_not()")
        s.let("logits", f"logits.masked_fill({dropped}, {fill})")
    elif spelling == "sequential":
        for number, term in enumerate(terms):
            nothing = () if term.redundant else (f"torch.zeros_like({term.name})",)
            hide = s.slip(f"step_{number}", f"~{term.name}", term.name, *nothing)
            s.let("logits", f"logits.masked_fill({hide}, {fill})")
    else:
        s.let("logits", f"logits + (1.0 - visible.to(logits.dtype)) * {fill}")

    softmax(s)
    if empty:
        after = s.pick("empty_rows", "masked_fill", "where", "multiply", "rows")
        if after == "masked_fill":
            s.let("p", "p.masked_fill(~visible, 0.0)")
        elif after == "where":
            s.let("p", "torch.where(visible, p, 0.0)")
        elif after == "multiply":
            s.let("p", "p * visible")
        else:
            s.let("p", "p * visible.any(-1, keepdim=True)")
    odd = s.slip("probabilities", "", "p.square()", "p.clamp(max=0.1)")
    if odd:
        s.let("p", odd)
    return "p"


def flip_mask(s: Source) -> None:
    """Nothing, or a mutant of `visible`."""
    flipped = s.slip("mask", "", "~visible", "visible & (torch.arange(visible.shape[-1]) % 3 != 1)")
    if flipped:
        s.let("visible", flipped)


def fill_value(s: Source, *, finite: bool) -> str:
    """What masked logits become."""
    options = ("-1e9", "finfo.min", "-finfo.max") if finite else ("-inf", "finfo.min", "-1e9", "-finfo.max", "-torch.inf")
    right = {
        "-inf": 'float("-inf")',
        "-torch.inf": "-torch.inf",
        "finfo.min": "torch.finfo(logits.dtype).min",
        "-finfo.max": "-torch.finfo(logits.dtype).max",
        "-1e9": "-1e9",
    }[str(s.pick("fill", *options))]
    # Logits without a scale reach tens, under which -2 would be as good as nothing.
    return s.slip("fill", right, "0.0" if s.trail[s.full("scale")] == "none" else "-2.0")


def softmax(s: Source) -> None:
    """`logits` to `p`, over the last axis."""
    spelling = s.pick("softmax", "torch", "functional", "method", "float32", "by_hand", "by_hand_max", "logsumexp", "log_softmax")
    axis = s.slip("softmax_axis", "-1", "-2")
    if spelling == "torch":
        s.let("p", f"torch.softmax(logits, dim={axis})")
    elif spelling == "functional":
        s.let("p", f"F.softmax(logits, dim={axis})")
    elif spelling == "method":
        s.let("p", f"logits.softmax({axis})")
    elif spelling == "float32":
        s.let("p", f"F.softmax(logits, dim={axis}, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)")
    elif spelling == "logsumexp":
        s.let("p", f"(logits - logits.logsumexp({axis}, keepdim=True)).exp()")
    elif spelling == "log_softmax":
        s.let("p", f"logits.log_softmax({axis}).exp()")
    else:
        top = "logits.amax({0}, keepdim=True)" if spelling == "by_hand" else "logits.max(dim={0}, keepdim=True).values"
        s.let("e", f"torch.exp(logits - {top.format(axis)})")
        s.let("p", "e / " + s.slip("sum", f"e.sum({axis}, keepdim=True)", f"(1 + e.sum({axis}, keepdim=True))"))


def sdpa(s: Source, space: str, terms: list[Term], *, layout: str, empty: bool, out: str) -> None:
    """The mask handed to scaled_dot_product_attention. Writes `out`; "bnhd" comes back as "bhnd"."""
    if layout == "bnhd":
        for name in ("qs", "ks", "vs"):
            s.let(name, f"{name}.transpose(1, 2)")
    elif layout == "thd":
        for name in ("qs", "ks", "vs"):
            s.let(name, f"{name}.transpose(0, 1)")
    elif layout == "kt":
        s.let("ks", "ks.mT")
    s.let("visible", " & ".join(term.name for term in terms))
    flip_mask(s)
    extra = ", enable_gqa=True" if space == "native" else ""
    where = s.pick("scale", "default", "argument", "q")
    if where == "argument":
        extra += ", scale=" + s.slip("scale", "D**-0.5", "D**-1.0")
    elif where == "q":
        s.let("qs", "qs * " + s.slip("scale", "0.5", "0.25"))
        extra += ", scale=1.0"
    if empty or s.pick("attn_mask", "bool", "float", "float_where") == "bool":
        s.let("mask", "visible")
    else:
        options = {"-inf": "-torch.inf", "finfo.min": "torch.finfo(qs.dtype).min", "-1e9": "-1e9"}
        fill = s.slip("fill", options[str(s.pick("fill", *options))], "-2.0")
        if s.trail[s.full("attn_mask")] == "float":
            s.let("mask", f"torch.zeros(visible.shape, dtype=qs.dtype).masked_fill(~visible, {fill})")
        else:
            s.let("mask", f"torch.where(visible, torch.zeros((), dtype=qs.dtype), {fill})")
    s.let(out, f"F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask{extra})")
    if layout == "thd":
        s.let(out, f"{out}.transpose(0, 1)")
