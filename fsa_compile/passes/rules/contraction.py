"""Values: contractions and softmaxes."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from torch.fx import Node

from ...report import ReasonKind
from .. import expr as x
from .. import operands
from ..expr import Expr
from ..nodes import argument, axis, constant_factor, dtype, is_real, is_tensor, op_name, rank
from ..reader import Coords, Mode, Reader, fused, values
from ..refusal import Refusal
from .incidence import incidence

PRODUCTS = ("mul", "multiply")


def operand(r: Reader, n: Node, c: Coords, m: Mode = Mode.FORMULA) -> tuple[Node, Coords, Expr]:
    """A factor of a contraction that is read in mode `m`."""
    return n, c, r.read(n, c, m if m is Mode.SCORE else Mode.OPERAND)


@values("matmul", "bmm", "mm")
def _matmul(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a, b = n.args[:2]
    return _product(r, n, a, b, c, m) if rank(a) >= 2 and rank(b) >= 2 and is_real(n) else None


@values("baddbmm")
def _baddbmm(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """``beta * t + alpha * a @ b``; with beta 0 not even a NaN of t counts."""
    t, a, b = n.args[:3]
    alpha, beta = n.kwargs.get("alpha", 1), n.kwargs.get("beta", 1)
    if not is_real(n) or not all(isinstance(f, (int, float)) for f in (alpha, beta)):
        return None
    product = x.scaled(_product(r, n, a, b, c), alpha)
    return product if beta == 0 else x.add_reals(product, x.scaled(r.operand(n, t, c, m), beta))


def _product(r: Reader, n: Node, a: Node, b: Node, c: Coords, m: Mode = Mode.FORMULA) -> Expr:
    """Element `c` of ``a @ b``."""
    k = x.var(f"{n.name}.k", r.shape(a)[-1])
    left, right = r.align(a, (*c[:-1], k)), r.align(b, (*c[:-2], k, c[-1]))
    counted = incidence(r, n, c, [k], [(a, left), (b, right)])
    if counted is not None:
        return counted
    return r.contraction([k], [operand(r, a, left, m), operand(r, b, right, m)])


@values("linalg_vecdot")
def _vecdot(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a, b = n.args[:2]
    d = axis(n.kwargs.get("dim", -1), rank(n) + 1)
    if not is_real(n):
        return None
    k = x.var(f"{n.name}.k", r.shape(a)[d - rank(n) - 1])
    inside = (*c[:d], k, *c[d:])
    return r.contraction([k], [operand(r, t, r.align(t, inside)) for t in (a, b)])


def sum_of_products(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """``(a * b).sum(dims)`` as the contraction that it is; None if no product of two tensors is summed. Scores are summed anyhow."""
    source, dims, keepdim = n.args[0], argument(n, 1, "dim"), bool(argument(n, 2, "keepdim", False))
    if not dims or dtype(n) != dtype(source):
        return None
    summed = sorted({axis(d, rank(source)) for d in ([dims] if isinstance(dims, int) else dims)})
    bound = {d: x.var(f"{n.name}.k{d}", r.shape(source)[d]) for d in summed}
    rest = iter(c)
    at = []
    for d in range(rank(source)):
        if d not in bound or keepdim:
            kept = next(rest)
        at.append(bound[d] if d in bound else kept)
    if m is Mode.SCORE:
        return r.contraction(list(bound.values()), [operand(r, source, tuple(at), m)])
    found = _two_factors(r, source, tuple(at))
    if found is None:
        return None
    factor, a, b = found
    return x.scaled(r.contraction(list(bound.values()), [operand(r, *a), operand(r, *b)]), factor)


def _two_factors(r: Reader, n: Node, c: Coords) -> tuple[float, tuple[Node, Coords], tuple[Node, Coords]] | None:
    """Element `c` of `n` as a number times one element each of two tensors."""
    factor = 1.0
    while True:
        scaled = constant_factor(n)
        step = r.move(n, c, Mode.OPERAND)
        if scaled is not None:
            factor *= scaled[1]
            n, c = scaled[0], r.align(scaled[0], c)
        elif step is not None and step.guard is x.TRUE and dtype(step.source) == dtype(n):
            n, c = step.source, step.coords
        else:
            break
    if op_name(n) not in PRODUCTS or not all(is_tensor(a) and is_real(a) for a in n.args[:2]):
        return None
    a, b = n.args[:2]
    return factor, (a, r.align(a, c)), (b, r.align(b, c))


@values("einsum")
def _einsum(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    tensors = n.args[1]
    if not is_real(n):
        return None
    letters = einsum_letters(n.args[0], [rank(t) for t in tensors])
    if letters is None:
        return None
    inputs, output = letters
    sizes: dict[str, Expr] = {}
    for subscripts, t in zip(inputs, tensors):
        for ch, size in zip(subscripts, r.shape(t)):
            if sizes.get(ch, x.ONE) is x.ONE:  # a size of one broadcasts
                sizes[ch] = size
    env = dict(zip(output, c))
    bound = [x.var(f"{n.name}.{ch}", size) for ch, size in sizes.items() if ch not in env]
    env.update(zip((ch for ch in sizes if ch not in env), bound))
    places = []
    for subscripts, t in zip(inputs, tensors):
        places.append((t, tuple(x.ZERO if s is x.ONE else env[ch] for ch, s in zip(subscripts, r.shape(t)))))
    counted = incidence(r, n, c, bound, places)
    return r.contraction(bound, [operand(r, t, at, m) for t, at in places]) if counted is None else counted


def einsum_letters(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """Subscripts per operand and of the output, with ``...`` spelled out and an implicit output made explicit."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    inputs = left.split(",")
    spare = [ch for ch in string.ascii_letters if ch not in equation]
    dots = max((rk - len(s.replace("...", "")) for s, rk in zip(inputs, ranks) if "..." in s), default=0)
    batch = "".join(spare[:dots])
    out = []
    for s, rk in zip(inputs, ranks):
        width = rk - len(s.replace("...", ""))
        out.append(s.replace("...", batch[dots - width :] if width else ""))
        if len(out[-1]) != rk:
            return None
    if not arrow:
        joined = "".join(out)
        named = sorted(ch for ch in set(joined) if joined.count(ch) == 1 and ch not in batch)
        return out, batch + "".join(named)
    return out, right.replace("...", batch)


@values("softmax", "_softmax", "_safe_softmax", "special_softmax")
def _softmax(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.softmax(n.name, c)


def deferred_softmax(r: Reader, n: Node, c: Coords) -> Expr | None:
    """``(e @ v) / e.sum()``: the contraction of the probabilities with v, if the sum is that of the same row."""
    normalised = r.normalised(n)
    assert normalised is not None and normalised.numerator is not None
    numerator, weights, d = normalised.numerator, normalised.weights, normalised.axis
    product = r.read(numerator, r.align(numerator, c))
    factors = r.operands.get(product, ())
    places = [(k, step.coords) for k, f in enumerate(factors) for step in _down_to(r, f, weights)]
    if product.op != "dot" or len(factors) != 2 or not places:
        return None
    position, at = places[0]
    if [v for v in product.args[0]] != [x.as_var(at[d])]:
        return None
    row = _row(r, normalised.divisor, c)
    if row is None:
        return None
    keepdim = len(row) == rank(weights)
    if row != (at[:d] + (x.ZERO,) + at[d + 1 :] if keepdim else at[:d] + at[d + 1 :]):
        return None
    other, where = factors[1 - position]
    assert other is not None
    return r.contraction([at[d]], [(None, (), x.softmax(n.name, at)), operand(r, other, where)])


def _row(r: Reader, divisor: Sequence[Node], c: Coords) -> Coords | None:
    """The row of the sum that element `c` of a quotient is divided by."""
    at = r.align(divisor[0], c)
    for n, below in zip(divisor, divisor[1:]):
        step = r.move(n, at, Mode.FORMULA)
        if step is not None and (step.source is not below or step.guard is not x.TRUE):
            return None
        at = step.coords if step is not None else r.align(below, at)
    return at


def _down_to(r: Reader, factor: tuple[Node | None, Coords], node: Node) -> list[operands.Step]:
    """Where a factor of a contraction stands in a node that it is a view of."""
    if factor[0] is None:
        return []
    return [s for s in operands.chain(r, factor[0], factor[1]) if s.node is node and s.guard is x.TRUE and s.factor == 1]


@values("scaled_dot_product_attention")
def _sdpa(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if argument(n, 4, "dropout_p", 0.0):
        return None
    k, v = n.args[1:3]
    j = x.var(f"{n.name}.j", r.shape(k)[-2])
    coords = r.align(v, (*_kv_lead(r, n, c), j, c[-1]))
    return r.contraction([j], [(None, (), x.softmax(n.name, (*c[:-1], j))), operand(r, v, coords)])


def _kv_lead(r: Reader, n: Node, c: Coords) -> Coords:
    """Batch and head coordinates of the keys for those of the queries."""
    q, k = n.args[:2]
    if not n.kwargs.get("enable_gqa", False):
        return c[:-2]
    hq, hkv = x.constant(r.shape(q)[-3]), x.constant(r.shape(k)[-3])
    if hq is None or hkv is None:
        for size in (r.shape(q)[-3], r.shape(k)[-3]):
            r.sizes.want_number(size)
        raise Refusal(ReasonKind.HEAD_MAP, "the number of heads is dynamic")
    return (*c[:-3], x.floordiv(c[-3], hq // hkv))


@fused("scaled_dot_product_attention")
def _sdpa_logit(r: Reader, n: Node, c: Coords) -> Expr:
    """The logit of SDPA at (..., query, key): scaled, causal from the top left, masked or biased."""
    q, k = n.args[:2]
    mask = argument(n, 3, "attn_mask")
    scale = n.kwargs.get("scale")
    d = x.var(f"{n.name}.d", r.shape(q)[-1])
    *lead, i, j = c
    e = r.contraction(
        [d],
        [
            operand(r, q, r.align(q, (*lead, i, d))),
            operand(r, k, r.align(k, (*_kv_lead(r, n, (*lead, i, x.ZERO)), j, d))),
        ],
    )
    if scale is None:
        width = x.constant(r.shape(q)[-1])
        if width is None:
            r.sizes.want_number(r.shape(q)[-1])
            raise Refusal(ReasonKind.SHAPE, "the head dimension is dynamic")
        scale = width**-0.5
    e = x.scaled(e, float(scale))
    if argument(n, 5, "is_causal", False):
        e = x.select(x.at_least(i, j), e, x.real(-math.inf))
    if is_tensor(mask):
        b = r.read(mask, r.align(mask, tuple(c)))
        e = x.select(b, e, x.real(-math.inf)) if b.sort == x.BOOL else x.add_reals(b, e)
    return e
