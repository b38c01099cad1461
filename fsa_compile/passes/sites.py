"""Attention sites: softmaxes whose probabilities are contracted with something."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from .handmade import EXPONENTIALS
from .nodes import argument, is_real, is_tensor, op_name
from .reader import FUSED, HANDMADE, SOFTMAXES, Reader

CONTRACTIONS = ("matmul", "bmm", "mm", "baddbmm", "einsum")
FEW = 8
"""A softmax over fewer whose weights multiply something that is summed is a gate over branches."""
_TRANSPARENT = frozenset(
    "view reshape _unsafe_view permute transpose clone contiguous squeeze unsqueeze alias _to_copy to dropout "
    "native_dropout nan_to_num masked_fill where mul div getitem expand slice flatten unflatten detach type_as select_scatter "
    "slice_scatter scatter index_put copy".split()
)
"""What may stand between probabilities and their contraction; the reader decides whether it is harmless."""


@dataclass(frozen=True)
class SiteNodes:
    """The two shadow nodes of a site: they are one for an op that is a whole attention."""

    softmax: Node
    contraction: Node


def find_sites(r: Reader) -> Iterator[SiteNodes]:
    """Every softmax that reaches a contraction, in graph order.

    Args:
        r: Reader of the shadow graph.
    """
    deferred = {d.numerator for n in r.graph_module.graph.nodes if (d := r.normalised(n)) is not None and d.deferred}
    for n in r.graph_module.graph.nodes:
        name = op_name(n)
        if not name or not is_tensor(n) or not is_real(n):
            continue
        if name in FUSED:
            yield SiteNodes(n, n)
        elif r.divides_sum(n):
            yield SiteNodes(n, n)
        elif name in SOFTMAXES or name in HANDMADE and r.handmade_softmax(n) is not None:
            for c in _contractions(r, n):
                if c not in deferred:  # probabilities that are summed up and then divided by their own sum
                    yield SiteNodes(n, c)


def unmatched_weights(r: Reader, sites: Sequence[SiteNodes]) -> Iterator[SiteNodes]:
    """Exponentials that reach a contraction outside of every site: softmaxes in a form that is not known.

    Args:
        r: Reader of the shadow graph.
        sites: What `find_sites` found.
    """
    divided = (r.normalised(s.softmax) for s in sites)
    known = {s.contraction for s in sites} | {d.numerator for d in divided if d is not None}
    for n in r.graph_module.graph.nodes:
        if op_name(n) in EXPONENTIALS and is_tensor(n) and n.meta["val"].dim() >= 2:
            for c in _contractions(r, n):
                if c not in known:
                    yield SiteNodes(n, c)


def _sums_values(n: Node, weights: Node) -> bool:
    """Whether ``(p[..., None] * v).sum(d)`` sums values; a sum of probabilities, masked or not, is none."""
    if op_name(n) != "sum" or not is_tensor(n.args[0]) or op_name(n.args[0]) not in ("mul", "multiply"):
        return False
    product = n.args[0].meta["val"]
    sizes = [s for s in weights.meta["val"].shape if not isinstance(s, int) or s != 1]
    dims = argument(n, 1, "dim")
    summed = [product.shape[d] for d in ([dims] if isinstance(dims, int) else dims or ())]
    many = not any(isinstance(s, int) and s < FEW for s in summed[:1]) or len(summed) > 1
    return many and len([s for s in product.shape if not isinstance(s, int) or s != 1]) > len(sizes)


def _contractions(r: Reader, n: Node) -> list[Node]:
    """What sums up values with the probabilities `n`; those that are divided by their sum again are a softmax of their own."""
    found: list[Node] = []
    seen, todo = {n}, [n]
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            name = op_name(user)
            if r.is_quotient(user):
                continue
            contracts = name in CONTRACTIONS or _sums_values(user, n)
            weighs = contracts and _weighs(r, user, seen)
            if contracts and not weighs and is_tensor(user) and user.meta["val"].dim() >= 2:
                found.append(user)
            elif weighs or name in _TRANSPARENT or name in ("add", "sub") and _same_shape(user, n):
                todo.append(user)
    return sorted(found, key=list(n.graph.nodes).index)


def _weighs(r: Reader, contraction: Node, probabilities: set[Node]) -> bool:
    """Whether all that probabilities are multiplied with are numbers that no data decide, as in ``p @ overlap``: the result is
    a score for each block, not attention."""
    todo = [n for n in contraction.all_input_nodes if n not in probabilities]
    if not todo:
        return False
    above = set(todo)
    while todo:
        n = todo.pop()
        if n.op == "placeholder" and n.name not in r.buffers and is_tensor(n):
            return False
        new = [a for a in n.all_input_nodes if a not in above]
        above.update(new)
        todo += new
    return True


def _same_shape(a: Node, b: Node) -> bool:
    """Whether a sum is still one of probabilities (a straight-through estimator, say), not one of outputs."""
    return is_tensor(a) and a.meta["val"].shape == b.meta["val"].shape


def dropout_between(n: Node) -> float:
    """The dropout probability on the way from the probabilities to their contraction, 0.0 if none."""
    if op_name(n) == "scaled_dot_product_attention":
        return float(argument(n, 4, "dropout_p", 0.0))
    for user in n.users:
        if op_name(user) in ("dropout", "native_dropout") and argument(user, 2, "train", False):
            return float(argument(user, 1, "p", 0.5))
    return 0.0
