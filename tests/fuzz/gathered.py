"""Attention over gathered keys: each query reads copies of its own blocks (S2)."""

from __future__ import annotations

from fuzz import dense
from fuzz.choices import Source
from fuzz.masks import Term
from fuzz.selection import Selection


def attention(s: Source, selection: Selection, *, order: str, out: str) -> str:
    """Selected attention of `qh` over `kh`, `vh` (b, h, n, d) at `idx`. Gives the name of the result (b, n, HQ, d)."""
    masked = keys(s, selection)
    kg = selection.heads == "kv"
    s.let("kg", "kh")
    s.let("vg", s.slip("values", "vh", "vh.roll(1, 2)", *s.detached("vh")))
    if not kg:
        spelling = s.pick("gqa", *(("repeat_interleave", "expand", "index") if order == "interleave" else ("tile", "tile_cat")))
        s.let("kg", dense.repeat(s, "kg", "bhnd", str(spelling)))
        right = dense.repeat(s, "vg", "bhnd", str(spelling))
        if s.sizes["HKV"] > 1 and s.sizes["G"] > 1:
            other = "tile" if order == "interleave" else "repeat_interleave"
            right = s.slip("head_order_v", right, dense.repeat(s, "vg", "bhnd", other))
        s.let("vg", right)
    spelling = str(s.pick("gather", "gather", "take_along_dim", "advanced", "tokens", "embedding"))
    s.let("kg", read(spelling, "kg", "D", "blocks_read"))
    s.let("vg", read(spelling, "vg", "DV", s.slip("values_of", "blocks_read", "blocks_read.flip(-1)", "blocks_read.roll(1, 2)")))

    s.let("qs", "qh")
    if kg:
        s.let("qs", "qs.unflatten(1, (HKV, G))" if order == "interleave" else "qs.unflatten(1, (G, HKV)).transpose(1, 2)")
    product = s.pick("product", "einsum", "matmul", "sdpa")
    if product == "sdpa":
        if kg:
            s.let("qs", "qs.transpose(2, 3)")  # (b, HKV, n, G, D)
        else:
            s.let("qs", "qs.unsqueeze(3)")
        if masked:
            s.let("mask", "seen.unsqueeze(-2)")
        # Where a query may see nothing, only the boolean mask promises zeros.
        if masked and selection.own != "out" and s.pick("attn_mask", "bool", "float") == "float":
            fill = s.slip("fill", "-torch.inf", "-2.0")
            s.let("mask", f"torch.zeros(mask.shape, dtype=qs.dtype).masked_fill(~mask, {fill})")
        s.let(out, f"F.scaled_dot_product_attention(qs, kg, vg{', attn_mask=mask' if masked else ''})")
        s.let(out, f"{out}.transpose(2, 3)" if kg else f"{out}.squeeze(3)")
    else:
        s.let("ks", "kg")
        dense.scale(s)
        if product == "einsum":
            s.let("logits", f'torch.einsum("{"bkgid,bkijd->bkgij" if kg else "bhid,bhijd->bhij"}", qs, ks)')
        elif kg:
            s.let("logits", "(qs.transpose(2, 3) @ ks.mT).transpose(2, 3)")
        else:
            s.let("logits", "(qs.unsqueeze(3) @ ks.mT).squeeze(3)")
        dense.scale_logits(s)
        p = dense.probabilities(s, [Term("seen.unsqueeze(2)" if kg else "seen")] if masked else [], empty=selection.own == "out")
        if product == "einsum":
            s.let(out, f'torch.einsum("{"bkgij,bkijd->bkgid" if kg else "bhij,bhijd->bhid"}", {p}, vg)')
        elif kg:
            s.let(out, f"({p}.transpose(2, 3) @ vg).transpose(2, 3)")
        else:
            s.let(out, f"({p}.unsqueeze(3) @ vg).squeeze(3)")
    if kg:
        s.let(out, f"{out}.flatten(1, 2)" if order == "interleave" else f"{out}.transpose(1, 2).flatten(1, 2)")
    return s.let(out, f"{out}.transpose(1, 2)")


def keys(s: Source, selection: Selection) -> bool:
    """Write `blocks_read` (b, o, n, t), all in range, and `seen` (b, o, n, t*BLOCK): which gathered keys count.

    Returns:
        Whether there is a `seen`; without one every gathered key counts.
    """
    valid = {"none": "", "minus": "idx >= 0", "sentinel": "idx < blocks"}[selection.padding]
    s.let("blocks_read", {"none": "idx", "minus": "idx.clamp(min=0)", "sentinel": "idx.clamp(max=blocks - 1)"}[selection.padding])
    own = "(i // BLOCK)[:, None]"
    if selection.own == "joined":
        past = f"blocks_read < {own}"
        s.let("past", s.slip("own_twice", past, f"blocks_read <= {own}") if selection.own_listed else past)
        s.let("valid", f"past & ({valid})" if valid else "past")
        s.let("own_column", f"{own}.expand(*idx.shape[:-1], 1)")
        s.let("blocks_read", "torch.cat([blocks_read, own_column], dim=-1)")
        s.let("valid", "torch.cat([valid, torch.ones_like(own_column, dtype=torch.bool)], dim=-1)")
        valid = "valid"
    elif selection.own == "out":
        valid = f"({valid or 'blocks_read >= 0'}) & (blocks_read < {own})"
    s.let("place", "(blocks_read.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(-2)")
    terms = []
    if selection.rule == "causal":
        with s.redundant(selection.own == "out"):  # Then only whole past blocks are read.
            terms.append(s.slip("causal", "(place <= i[:, None])", "(place <= i[:, None] + 1)", "(place >= 0)"))
    elif selection.rule == "diagonal":
        inside = s.slip("causal", "(place <= i[:, None])", "(place <= i[:, None] + 1)")
        terms.append(f"((place // BLOCK != {own}) | {inside})")
    if valid:
        s.let("valid", valid)
        spelling = s.pick("valid_tokens", "repeat_interleave", "expand", "index")
        terms.append(
            {
                "repeat_interleave": "valid.repeat_interleave(BLOCK, -1)",
                "expand": "valid.unsqueeze(-1).expand(*valid.shape, BLOCK).flatten(-2)",
                "index": "valid[..., torch.arange(valid.shape[-1] * BLOCK) // BLOCK]",
            }[str(spelling)]
        )
    if terms:
        s.let("seen", " & ".join(terms))
    return bool(terms)


def read(spelling: str, source: str, size: str, listed: str) -> str:
    """The listed blocks of `source` (b, o, n, size) as (b, o, n, t*BLOCK, size)."""
    in_blocks = f"{source}.unflatten(2, (blocks, BLOCK))"
    if spelling == "gather":
        rows = f"{in_blocks}.unsqueeze(2).expand(-1, -1, n, -1, -1, -1)"
        return f"{rows}.gather(3, {listed}[..., None, None].expand(-1, -1, -1, -1, BLOCK, {size})).flatten(3, 4)"
    if spelling == "take_along_dim":
        return f"torch.take_along_dim({in_blocks}.unsqueeze(2), {listed}[..., None, None], dim=3).flatten(3, 4)"
    first = f"torch.arange({source}.shape[0])[:, None, None, None]"
    second = f"torch.arange({source}.shape[1])[None, :, None, None]"
    if spelling == "advanced":
        return f"{in_blocks}[{first}, {second}, {listed}].flatten(3, 4)"
    if spelling == "tokens":
        place = f"({listed}.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(-2)"
        flat = f"{place}.flatten(2).unsqueeze(-1).expand(-1, -1, -1, {size})"
        return f"{source}.gather(2, {flat}).unflatten(2, (n, -1))"
    row = f"({first} * {source}.shape[1] + {second}) * blocks + {listed}"
    return f"F.embedding({row}, {in_blocks}.flatten(3).flatten(0, 2)).unflatten(-1, (BLOCK, {size})).flatten(3, 4)"
