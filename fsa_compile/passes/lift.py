"""From a softmax between two contractions to the normal form of `attention_form`, whatever the spelling.

`lift` yields candidates: where the output is taken is a choice, and so is the cut below Q, K and V. Each candidate is a
sound description of the same computation; `classify` takes the first that is a known role.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ..report import ReasonKind
from . import expr as x
from .attention_form import AttentionForm
from .cut import cut
from .expr import Expr
from .nodes import is_real, is_tensor, op_name, rank
from .normal_form import Anchor, NormalForm, normal_form
from .operands import chain
from .reader import CREATIONS, Reader
from .refusal import Refusal

INDEX_OPS = frozenset(
    "view reshape _unsafe_view permute transpose clone contiguous slice squeeze unsqueeze movedim alias unflatten "
    "flatten _to_copy to".split()
)
"""Through these the output is followed to the node that has the best shape to replace."""
ZEROING = frozenset("mul masked_fill where".split())
"""By these rows of the output become zero, ``output * mask.any(-1, keepdim=True)``; `normal_form` says which."""


def lift(r: Reader, softmax: Node, contraction: Node, replaceable: frozenset[Node]) -> Iterator[AttentionForm]:
    """The candidate forms of the site, the most useful first.

    Args:
        r: Reader of the shadow graph.
        softmax: The node that normalises (or the SDPA node).
        contraction: The node that multiplies the probabilities with the values.
        replaceable: Shadow nodes that stand for a node of the Dynamo graph: only these can be operands or output.

    Raises:
        Refusal: If no candidate exists.
    """
    refusals: list[Refusal] = []
    nearer: list[Refusal] = []
    found = False
    for anchor in _anchors(r, contraction, replaceable):
        raw = None
        try:
            raw = normal_form(r, softmax, contraction, anchor)
            for form in cut(r, softmax, anchor, raw, replaceable):
                found = True
                yield form
        except Refusal as refusal:
            if raw is None:
                refusals.append(refusal)
            else:
                nearer.append(_the_same_for_all(r, raw) or refusal)
    if not found:
        for refusal in (*nearer, *refusals):
            raise refusal
        raise Refusal(ReasonKind.SHAPE, "the output has no view as (batch, heads, queries, values)")


def _the_same_for_all(r: Reader, raw: NormalForm) -> Refusal | None:
    """The refusal of keys that are gathered by picks of which nothing is left further down: picks along an axis of copies."""
    jv = x.as_var(raw.j)
    steps = chain(r, *raw.k)
    at = [c for c in steps[-1].coords if jv in c.free]
    if any(len(c.free) > 1 for c in at) or any(map(_picked, steps[-1].coords)):
        return None
    if not any(_picked(c) for s in steps for c in s.coords):
        return None
    text = "whatever was picked, all queries see the same keys: the gather runs along an axis of copies"
    return Refusal(ReasonKind.MASK, text)


def _picked(c: Expr) -> bool:
    """Whether run-time values decide a coordinate."""
    return any(t.op == "apply" for t in x.walk(c))


def _anchors(r: Reader, n: Node, replaceable: frozenset[Node]) -> Iterator[Anchor]:
    """Nodes that hold the output, the deepest first: the contraction, the index ops that only it feeds, and what masks its rows."""
    path = [n]
    while True:
        users = [u for u in path[-1].users if op_name(u) not in CREATIONS]
        if len(users) != 1 or not (op_name(users[0]) in INDEX_OPS or _masks_rows(r, users[0], path[-1])):
            break
        path.append(users[0])
    for node in sorted(reversed(path), key=lambda p: rank(p) != 4):
        if node in replaceable:
            yield from _virtual(r, node)


def _masks_rows(r: Reader, n: Node, output: Node) -> bool:
    """Whether a node keeps the output or makes it a number, by something that is no real datum and the same for a whole row."""
    others = [a for a in n.args if is_tensor(a) and a is not output]
    if op_name(n) not in ZEROING or len(others) == len([a for a in n.args if is_tensor(a)]) or r.shape(n) != r.shape(output):
        return False
    return all(not is_real(a) or _numbers(r, a) for a in others)


def _numbers(r: Reader, n: Node) -> bool:
    """Whether the elements of a real tensor are constants, by cases."""
    at = [x.var(f"n{k}", size) if size is not x.ONE else x.ZERO for k, size in enumerate(r.shape(n))]
    return all(e.op == "const" for _, e in x.cases(r.read(n, at)))


def _virtual(r: Reader, n: Node) -> Iterator[Anchor]:
    shape = r.shape(n)

    def fresh(sizes: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(x.var(f"o{k}", s) if s is not x.ONE else x.ZERO for k, s in enumerate(sizes))

    if len(shape) == 4:
        o = fresh(shape)
        yield Anchor(n, shape, o, o)
    elif len(shape) in (2, 3):
        ones = (x.ONE,) * (4 - len(shape))
        o = fresh((*ones, *shape))
        yield Anchor(n, (*ones, *shape), o, o[len(ones) :])
    elif len(shape) == 5:  # grouped heads: (b, h, g, n, d) and (b, n, h, g, d)
        for k in (1, 2):
            sizes = (*shape[:k], x.times(shape[k], shape[k + 1]), *shape[k + 2 :])
            o = fresh(sizes)
            yield Anchor(n, sizes, o, (*o[:k], x.floordiv(o[k], shape[k + 1]), x.mod(o[k], shape[k + 1]), *o[k + 1 :]))
            # Grouped the other way round, as a tile of the keys does: (b, g, h, n, d).
            yield Anchor(n, sizes, o, (*o[:k], x.mod(o[k], shape[k]), x.floordiv(o[k], shape[k]), *o[k + 1 :]))
