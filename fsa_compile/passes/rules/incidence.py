"""Values: products of matrices of zeros and ones, which say what meets what: a mask of blocks times the map from blocks to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from .. import expr as x
from ..expr import Expr
from ..nodes import dtype, is_real, is_tensor, rounded
from ..reader import Coords, Mode, Reader


def incidence(r: Reader, n: Node, c: Coords, bound: Sequence[Expr], factors: Sequence[tuple[Node, Coords]]) -> Expr | None:
    """Element `c` of the contraction `n` over `bound`, if each factor is zero or one positive number everywhere, or is a count.

    Zero iff nothing meets. The product of the numbers where each bound variable has one value at most; a count of at least one where
    the numbers are ones: how many is not needed. Numbers are such that the sum is exact in any precision of matrix products.
    """
    if not all(_is_free_of_data(r, f) for f, _ in factors):
        return None
    weight, hit, once, most = 1.0, x.TRUE, True, 1.0
    for f, at in factors:
        e = r.coerce(n, r.read(f, at, Mode.VALUE))
        leaves = list(x.cases(e)) if e.sort == x.REAL else []
        counts = [t.args[0] for _, t in leaves if t.op == "float" and t.args[0].lo >= 1]
        numbers = {t.args[0] for _, t in leaves if t.op == "const"} - {0.0}
        if not leaves or any(t.op not in ("const", "float") for _, t in leaves) or len(numbers) > 1:
            return None
        if counts:
            once, most, numbers = False, most * max(t.hi for t in counts), numbers or {1.0}
        if len(counts) < sum(t.op == "float" for _, t in leaves):
            return None
        weight *= numbers.pop() if numbers else 0.0
        hit = x.conj(hit, *(x.negate(g) for g, t in leaves if t is x.real(0)))
        if not 0 <= weight == rounded(weight, torch.bfloat16):
            return None
    for v in bound:
        known = x.one_point(v, hit)
        once = once and known is not None
        most *= x.as_var(v).args[1].hi  # type: ignore[union-attr]
        hit = x.some(v, hit) if known is None else known
    if once:
        return x.select(hit, x.real(weight), x.real(0))
    if weight != 1 or most * torch.finfo(dtype(n)).eps > 1:
        return None
    return x.select(hit, x.from_int(x.apply(n.name, c, 1, most)), x.real(0))


def _is_free_of_data(r: Reader, n: Node) -> bool:
    """Whether a real tensor is computed from integers, truths and buffers alone; asked before anything is read."""
    found, todo = {n}, [n]
    while todo:
        t = todo.pop()
        if t in r.free_of_data:
            if not r.free_of_data[t]:
                break
            continue
        if t.op == "placeholder" and t.name not in r.buffers:
            r.free_of_data[t] = False
            break
        new = [a for a in t.all_input_nodes if is_tensor(a) and is_real(a) and a not in found]
        found.update(new)
        todo += new
    else:
        r.free_of_data.update(dict.fromkeys(found, True))
        return True
    r.free_of_data[n] = False
    return False
