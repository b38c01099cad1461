"""Windows that never form all logits: chunks that look back, unfolded keys, shifted slices, gathered positions."""

from __future__ import annotations

from fuzz import dense
from fuzz.choices import Source
from fuzz.masks import Term

SPELLINGS = ("chunks", "unfold", "slices", "positions")


def attention(s: Source, spelling: str, *, order: str, out: str) -> str:
    """The last `WINDOW` keys of each query, from `qh`, `kh`, `vh` (b, h, n, d). Gives the name of the result (b, n, HQ, d)."""
    s.let("qs", "qh")
    gqa = str(s.pick("gqa", *(("repeat_interleave", "expand", "index") if order == "interleave" else ("tile", "tile_cat"))))
    s.let("ks", dense.repeat(s, "kh", "bhnd", gqa))
    s.let("vs", dense.repeat(s, "vh", "bhnd", gqa))
    s.let("vs", s.slip("values", "vs", "vs.roll(1, 2)", *s.detached("vs")))
    s.let("i", "torch.arange(n)")
    if spelling == "chunks":
        chunks(s)
        subscripts = "bhcid,bhcjd->bhcij", "bhcij,bhcjd->bhcid"
    else:
        per_query(s, spelling)
        subscripts = "bhid,bhiwd->bhiw", "bhiw,bhiwd->bhid"
    dense.scale(s)
    s.let("logits", f'torch.einsum("{subscripts[0]}", qs, ks)')
    dense.scale_logits(s)
    p = dense.probabilities(s, [Term("seen")], empty=False)
    s.let(out, f'torch.einsum("{subscripts[1]}", {p}, vs)')
    if spelling == "chunks":
        s.let(out, f"{out}.flatten(2, 3)")
    return s.let(out, f"{out}.transpose(1, 2)")


def chunks(s: Source) -> None:
    """(b, h, c, CHUNK, d) queries against their chunk and those before it; `seen` (c, CHUNK, m)."""
    s.let("c", "n // CHUNK")
    s.let("qs", "qs.unflatten(2, (c, CHUNK))")
    s.let("place", "i.view(c, CHUNK)")
    back = s.pick("look_back", "pad", "cat", "unfold")
    for name in ("ks", "vs"):
        s.let(name, f"{name}.unflatten(2, (c, CHUNK))")
    if back == "pad":
        for name in ("ks", "vs"):
            s.let(name, f"torch.cat([F.pad({name}, (0, 0, 0, 0, 1, -1)), {name}], dim=3)")
        s.let("key", "torch.cat([F.pad(place, (0, 0, 1, -1), value=-1), place], dim=1)")
    elif back == "cat":
        for name in ("ks", "vs"):
            s.let(name, f"torch.cat([torch.cat([torch.zeros_like({name}[:, :, :1]), {name}[:, :, :-1]], 2), {name}], dim=3)")
        s.let("key", "place[:, :1] - CHUNK + torch.arange(2 * CHUNK)")
    else:
        for name in ("ks", "vs"):
            s.let(name, f"F.pad({name}.flatten(2, 3), (0, 0, CHUNK, 0)).unfold(2, 2 * CHUNK, CHUNK).transpose(-1, -2)")
        s.let("key", "F.pad(i, (CHUNK, 0), value=-1).unfold(0, 2 * CHUNK, CHUNK)")
    low = s.slip("causal", "(key[:, None, :] <= place[:, :, None])", "(key[:, None, :] <= place[:, :, None] + 1)")
    width = s.slip("window", "WINDOW", "(WINDOW - 1)", "(WINDOW - 2)")
    inside = f"(place[:, :, None] - key[:, None, :] < {width})"
    first = s.slip("padding", "(key >= 0)[:, None, :]", "(key >= -CHUNK)[:, None, :]")
    s.let("seen", f"{low} & {inside} & {first}")


def per_query(s: Source, spelling: str) -> None:
    """(b, h, n, WINDOW, d) keys, each query's own; `seen` (n, WINDOW)."""
    extra = s.slip("window", "WINDOW", "(WINDOW + 1)", "(WINDOW - 1)")
    if spelling == "unfold":
        for name in ("ks", "vs"):
            s.let(name, f"F.pad({name}, (0, 0, {extra} - 1, 0)).unfold(2, {extra}, 1).transpose(-1, -2)")
        s.let("key", f"i[:, None] - ({extra} - 1) + torch.arange({extra})")
    elif spelling == "slices":
        for name in ("ks", "vs"):
            s.let(name, f"torch.stack([F.pad({name}, (0, 0, back, 0))[:, :, :n] for back in range({extra})], dim=3)")
        s.let("key", f"i[:, None] - torch.arange({extra})")
    else:
        s.let("key", f"i[:, None] - torch.arange({extra})")
        for name in ("ks", "vs"):
            s.let(name, f"{name}[:, :, key.clamp(min=0)]")
    s.let("seen", s.slip("padding", "key >= 0", "key >= -2"))
