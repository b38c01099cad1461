"""Spellings of "who sees whom": positions, the causal band, a block selection as a mask over tokens.

Every function writes lines into a `Source` and gives back the name of the result, or an expression.
"""

from __future__ import annotations

from dataclasses import dataclass

from fuzz.choices import Source


@dataclass(frozen=True)
class Term:
    """A boolean mask that must hold: ``(n, m)`` if `heads` is empty, else ``(b, heads, n, m)`` with heads "kv" or "q".

    A redundant one follows from the others, and dropping it would change nothing.
    """

    name: str
    heads: str = ""
    redundant: bool = False


def positions(s: Source, name: str, length: str) -> str:
    """0, 1, ... as a vector."""
    spelling = s.pick(f"positions_{name}", "arange", "arange", "arange_device", "cumsum")
    return s.let(
        name,
        {
            "arange": f"torch.arange({length})",
            "arange_device": f"torch.arange({length}, device=x.device)",
            "cumsum": f"torch.ones({length}, dtype=torch.long).cumsum(0) - 1",
        }[str(spelling)],
    )


def causal(s: Source, name: str) -> str:
    """``(n, n)``: key j is not later than query i. The slips are a strict rule, one key of the future, and no rule."""
    spelling = s.pick(
        "causal", "compare", "difference", "tril", "tril_float", "not_triu", "not_future", "cumsum", "diagonal_block", "less"
    )
    everyone = "torch.ones(n, n, dtype=torch.bool)"
    if spelling == "compare":
        text = s.slip("causal", "i[:, None] >= j[None, :]", "i[:, None] + 1 >= j[None, :]", everyone)
    elif spelling == "less":
        text = s.slip("causal", "j.unsqueeze(0) < (i + 1).unsqueeze(1)", "j.unsqueeze(0) < (i + 2).unsqueeze(1)", everyone)
    elif spelling == "difference":
        text = s.slip("causal", "(i[:, None] - j) >= 0", "(i[:, None] - j) >= -1", "(i[:, None] - j).abs() >= 0")
    elif spelling == "tril":
        text = s.slip(
            "causal",
            "torch.tril(torch.ones(n, n, dtype=torch.bool))",
            "torch.tril(torch.ones(n, n, dtype=torch.bool), diagonal=1)",
            everyone,
        )
    elif spelling == "tril_float":
        text = s.slip("causal", "torch.ones(n, n).tril() == 1", "torch.ones(n, n).tril(1) == 1", "torch.ones(n, n) == 1")
    elif spelling == "not_triu":
        text = "~" + s.slip(
            "causal",
            "torch.ones(n, n, dtype=torch.bool).triu(1)",
            "torch.ones(n, n, dtype=torch.bool).triu(2)",
            "torch.zeros(n, n, dtype=torch.bool)",
        )
    elif spelling == "not_future":
        text = s.slip("causal", "torch.logical_not(j[None, :] > i[:, None])", "torch.logical_not(j[None, :] > i[:, None] + 2)")
    elif spelling == "cumsum":
        text = s.slip("causal", "torch.eye(n).cumsum(0) > 0", "torch.eye(n).cumsum(0) >= 0")
    else:  # Past blocks whole, and inside the own block no later key.
        past = "(j // BLOCK < (i // BLOCK)[:, None])"
        own = "(j // BLOCK == (i // BLOCK)[:, None])"
        text = f"{past} | ({own} & " + s.slip("causal", "(j <= i[:, None])", "(j <= i[:, None] + 1)", "(j >= 0)") + ")"
    return s.let(name, text)


def band(s: Source, name: str) -> str:
    """``(n, n)``: the last `WINDOW` keys up to the query's own."""
    spelling = s.pick("band", "difference", "two_compares", "tril_triu", "lower_bound", "inverted")
    if spelling == "difference":
        s.let("distance", "i[:, None] - j[None, :]")
        low = s.slip("causal", "(distance >= 0)", "(distance >= -1)", "(distance.abs() >= 0)")
        return s.let(name, f"{low} & (distance < {width(s)})")
    if spelling == "two_compares":
        low = s.slip("causal", "(j[None, :] <= i[:, None])", "(j[None, :] <= i[:, None] + 1)")
        return s.let(name, f"{low} & (j[None, :] > i[:, None] - {width(s)})")
    if spelling == "tril_triu":
        lower = s.slip("causal", ".tril()", ".tril(1)")
        off = s.slip("window", "1 - WINDOW", "-WINDOW", "2 - WINDOW")
        return s.let(name, f"torch.ones(n, n, dtype=torch.bool){lower}.triu({off})")
    if spelling == "lower_bound":
        s.let("first", f"(i - {width(s)} + 1).clamp(min=0)")
        upper = s.slip("causal", "(j <= i[:, None])", "(j <= i[:, None] + 1)")
        return s.let(name, f"(j >= first[:, None]) & {upper}")
    s.let("hidden", f"(j[None, :] > i[:, None]) | (i[:, None] - j[None, :] >= {width(s)})")
    return s.let(name, s.slip("inverted", "~hidden", "hidden"))


def width(s: Source) -> str:
    return s.slip("window", "WINDOW", "(WINDOW + 1)", "(WINDOW - 1)")


def selected_tokens(s: Source, name: str, *, padding: str) -> str:
    """``(b, o, n, n)``: the block of key j is in the list `idx` ``(b, o, n, t)`` of query i.

    Args:
        s: Where to write; `idx`, `j`, `blocks` and the sizes are defined there.
        name: The result's name.
        padding: What stands in unused places of the list: "none" (nothing), "minus" (-1) or "sentinel" (the number of blocks).
    """


    def of_key() -> str:
        return s.slip("block_of_key", "j // BLOCK", "j // (BLOCK + 1)", "(j + 1).clamp(max=n - 1) // BLOCK")

    spelling = s.pick(
        "membership",
        "scatter",
        "scatter_in_place",
        "scatter_float",
        "one_hot_sum",
        "one_hot_any",
        "equal_blocks",
        "index_put",
        "equal_tokens",
        "scatter_tokens",
        "isin",
        "scatter_add",
    )
    if spelling == "equal_tokens":
        s.let("block_of_key", of_key())
        return s.let(name, "(idx.unsqueeze(-2) == block_of_key.unsqueeze(-1)).any(-1)")
    if spelling == "isin":  # Every row gets numbers of its own.
        s.let("row", "torch.arange(idx[..., 0].numel()).view(idx[..., 0].shape).unsqueeze(-1) * (blocks + 1)")
        s.let("listed", "row + torch.where((idx >= 0) & (idx < blocks), idx, blocks)")
        return s.let(name, f"torch.isin(row + {of_key()}, listed)")

    extra = {"none": "", "minus": " + 1", "sentinel": " + 1"}[padding]  # A place for what must not count.
    if spelling == "scatter_tokens":
        listed = {"none": "idx", "minus": "torch.where(idx < 0, blocks, idx)", "sentinel": "idx"}[padding]
        s.let("tokens", f"({listed}.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(-2)")
        room = "n" if padding == "none" else "n + BLOCK"
        s.let("bits", f"torch.zeros(*idx.shape[:-1], {room}, dtype=torch.bool).scatter(-1, tokens, True)")
        return s.let(name, "bits[..., :n]" if padding != "none" else "bits")

    if spelling == "equal_blocks":
        s.let("bits", "(idx[..., None] == torch.arange(blocks)).any(-2)")
    else:
        s.let("listed", "torch.where(idx < 0, blocks, idx)" if padding == "minus" else "idx")
        zeros = f"torch.zeros(*idx.shape[:-1], blocks{extra}"
        if spelling == "scatter":
            s.let("bits", f"{zeros}, dtype=torch.bool).scatter(-1, listed, True)")
        elif spelling == "scatter_in_place":
            s.let("bits", f"{zeros}, dtype=torch.bool)")
            s.body.append("bits.scatter_(-1, listed, True)")
        elif spelling == "scatter_float":
            s.let("bits", f"{zeros}).scatter(-1, listed, 1.0) > 0.5")
        elif spelling == "scatter_add":
            s.let("bits", f"{zeros}).scatter_add(-1, listed, torch.ones(listed.shape)) > 0")
        elif spelling == "one_hot_sum":
            s.let("bits", f"F.one_hot(listed, blocks{extra}).sum(-2) > 0")
        elif spelling == "one_hot_any":
            s.let("bits", f"F.one_hot(listed, blocks{extra}).bool().any(dim=-2)")
        else:
            s.let("bits", f"{zeros}, dtype=torch.bool)")
            s.let("b0", "torch.arange(idx.shape[0])[:, None, None, None]")
            s.let("b1", "torch.arange(idx.shape[1])[None, :, None, None]")
            s.let("b2", "torch.arange(idx.shape[2])[None, None, :, None]")
            s.body.append("bits[b0, b1, b2, listed] = True")
        if extra:
            s.let("bits", "bits[..., :blocks]")

    to_tokens = s.pick("to_tokens", "index", "repeat_interleave", "expand", "gather", "index_select")
    if to_tokens == "repeat_interleave":
        return s.let(name, "bits.repeat_interleave(BLOCK, dim=-1)")
    if to_tokens == "expand":
        return s.let(name, "bits.unsqueeze(-1).expand(*bits.shape, BLOCK).flatten(-2)")
    if to_tokens == "gather":
        return s.let(name, f"bits.gather(-1, ({of_key()}).expand(*bits.shape[:-1], n))")
    if to_tokens == "index_select":
        return s.let(name, f"bits.index_select(-1, {of_key()})")
    return s.let(name, f"bits[..., {of_key()}]")
