"""Spellings of the selection: scores of blocks, the own block's fate, the list of the best, what stands in unused places."""

from __future__ import annotations

from dataclasses import dataclass

from fuzz.choices import Source


@dataclass(frozen=True)
class Selection:
    """What is known of `idx` (b, heads, n, t).

    Args:
        heads: "kv" or "q".
        rule: "causal" (future keys are to be masked), "listed" (listed keys are seen, future or not) or "diagonal" (only inside
            the own block no later key).
        own: The own block is "in" the list, to be "joined" later, or "out" (then early queries see nothing).
        padding: In unused places stands "none" (some block), "minus" (-1) or "sentinel" (the number of blocks).
        own_listed: The own block may be in the list although it is joined later.
    """

    heads: str
    rule: str
    own: str
    padding: str
    own_listed: bool = False


def select(s: Source, *, order: str, gathered: bool) -> Selection:
    """Write `idx`, `blocks`, `i`, and what they need, from `qh`, `kh` in (b, h, n, d)."""
    rule = str(s.pick("rule", "causal", "causal", "causal", "listed", "diagonal"))
    heads = str(s.pick("owner", "kv", "kv", "q"))
    per_block = s.pick("rows", "query", "query", "query", "block") == "block"
    s.let("blocks", "n // BLOCK")
    scoring = str(s.pick("scores", "pooled", "softmax", "input", "keys_max", *(() if gathered else ("list",))))
    if scoring == "list":
        own = "joined"
        padding = str(s.pick("padding", "none", "minus", "sentinel"))
        low, high = {"none": ("0", "N // BLOCK"), "minus": ("-1", "N // BLOCK"), "sentinel": ("0", "N // BLOCK + 1")}[padding]
        rows = "N // BLOCK" if per_block else "N"
        name = s.input("listed_blocks", f"integers({low}, {high}, BATCH, {'HKV' if heads == 'kv' else 'HQ'}, {rows}, TOP)")
        s.let("idx", name)
        expand_rows(s, per_block)
        return Selection(heads, rule, own, padding, own_listed=True)

    write_scores(s, scoring, heads, order, per_block)
    s.let("row_block", "torch.arange(blocks)" if per_block else "i // BLOCK")
    own, own_listed = "in", False
    if rule == "causal":
        own = str(s.pick("own", "in", "in", "joined", "out"))
        own_listed = own == "joined" and s.pick("own_listed", "no", "yes") == "yes"
        eligible = ">" if own == "in" or own_listed else ">="
        s.let("closed", f"torch.arange(blocks) {eligible} row_block[:, None]")
        s.let("scores", "scores.masked_fill(closed, -torch.inf)")
        if own == "in":
            s.let("own_block", "torch.arange(blocks) == row_block[:, None]")
            force = s.pick("force", "masked_fill", "where", "add")
            s.let(
                "scores",
                {
                    "masked_fill": "scores.masked_fill(own_block, torch.inf)",
                    "where": "torch.where(own_block, torch.inf, scores)",
                    "add": "scores + torch.zeros(own_block.shape).masked_fill(own_block, torch.inf)",
                }[str(force)],
            )
    best(s)
    padding = "none"
    if rule == "causal":
        padding = str(s.pick("padding", "none", "minus", "sentinel"))
    if padding != "none":
        unused = "idx > row_block[:, None]" if own == "in" or own_listed else "idx >= row_block[:, None]"
        if s.pick("unused", "position", "score") == "score":
            unused = "best == -torch.inf"
        s.let("idx", f"idx.masked_fill({unused}, {'-1' if padding == 'minus' else 'blocks'})")
    expand_rows(s, per_block)
    return Selection(heads, rule, own, padding, own_listed)


def write_scores(s: Source, scoring: str, heads: str, order: str, per_block: bool) -> None:
    """`scores` (b, heads, rows, blocks), finite."""
    if scoring == "input":
        rows = "N // BLOCK" if per_block else "N"
        s.let("scores", s.input("block_scores", f"normal(BATCH, {'HKV' if heads == 'kv' else 'HQ'}, {rows}, N // BLOCK)"))
        return
    pool = "amax" if scoring == "keys_max" else "mean"
    s.let("k_blocks", f"kh.unflatten(2, (blocks, BLOCK)).{pool}(3)")
    s.let("q_groups", "qh.unflatten(1, (HKV, G))" if order == "interleave" else "qh.unflatten(1, (G, HKV)).transpose(1, 2)")
    if per_block:
        s.let("q_groups", "q_groups.unflatten(3, (blocks, BLOCK)).mean(4)")
    if scoring == "softmax":
        s.let("scores", 'torch.einsum("bkgid,bkjd->bkgij", q_groups, k_blocks).softmax(-1)')
        if heads == "kv":
            s.let("scores", "scores.sum(2)")
    elif heads == "kv":
        s.let("scores", 'torch.einsum("bkgid,bkjd->bkij", q_groups, k_blocks)')
    else:
        s.let("scores", 'torch.einsum("bkgid,bkjd->bkgij", q_groups, k_blocks)')
    if heads == "q":
        s.let("scores", "scores.flatten(1, 2)" if order == "interleave" else "scores.transpose(1, 2).flatten(1, 2)")


def best(s: Source) -> None:
    """`idx` and `best`, the blocks of the highest scores and these."""
    spelling = s.pick("best", "topk", "topk_function", "sort", "argsort")
    largest = s.slip("best", "True", "False")
    if spelling == "topk":
        s.let("best, idx", f"scores.topk(TOP, dim=-1, largest={largest})")
    elif spelling == "topk_function":
        s.let("best, idx", f"torch.topk(scores, k=TOP, largest={largest}, sorted=False)")
    elif spelling == "sort":
        s.let("best, idx", f"torch.sort(scores, dim=-1, descending={largest})")
        s.let("best, idx", "best[..., :TOP], idx[..., :TOP]")
    else:
        s.let("idx", f"scores.argsort(dim=-1, descending={largest})[..., :TOP]")
        s.let("best", "scores.gather(-1, idx)")
    s.let("idx", s.slip("index", "idx", "(idx - 1).clamp(min=0)", "(idx + 1) % blocks", "idx.flip(2)"))


def expand_rows(s: Source, per_block: bool) -> None:
    """A list for each query block becomes one for each query."""
    if not per_block:
        return
    spelling = s.pick("expand_rows", "index", "repeat_interleave", "expand")
    s.let(
        "idx",
        {
            "index": "idx[:, :, i // BLOCK]",
            "repeat_interleave": "idx.repeat_interleave(BLOCK, dim=2)",
            "expand": "idx.unsqueeze(3).expand(-1, -1, -1, BLOCK, -1).flatten(2, 3)",
        }[str(spelling)],
    )
