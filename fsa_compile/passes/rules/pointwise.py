"""Values: creation, arithmetic, comparisons, logic."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from .. import expr as x
from ..expr import Expr
from ..nodes import argument, dtype, exact, is_int, is_real, is_tensor, literal, op_name, rounded
from ..reader import Coords, Mode, Reader, Unreadable, values
from .contraction import deferred_softmax


@values("arange")
def _arange(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    given = [r.scalar(a) for a in n.args if not isinstance(a, torch.dtype)]
    if any(a is None for a in given):
        return None
    start = x.ZERO if len(given) == 1 else given[0]
    step = given[2] if len(given) > 2 else r.scalar(n.kwargs.get("step", 1))
    return r.coerce(n, x.plus(x.times(c[0], step), start))


@values("eye")
def _eye(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.select(x.equal(c[0], c[1]), literal(1, dtype(n)), literal(0, dtype(n)))


@values("zeros", "zeros_like", "new_zeros")
def _zeros(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return literal(0, dtype(n))


@values("ones", "ones_like", "new_ones")
def _ones(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return literal(1, dtype(n))


@values("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    name = op_name(n)
    if name == "new_full":
        v = argument(n, 2, "fill_value")
    elif name == "scalar_tensor":
        v = n.args[0]
    else:
        v = argument(n, 1, "fill_value")
    if isinstance(v, (bool, int, float)):
        return literal(v, dtype(n))
    size = r.scalar(v)
    if size is not None:
        return r.coerce(n, size)
    return r.coerce(n, r.read(v, ())) if is_tensor(v) and not r.shape(v) else None


@values("detach")
def _detach(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Of constants: they have no gradient to lose. Other data stay opaque where gradients flow."""
    e = r.read(n.args[0], c, Mode.VALUE)
    return e if all(t.op == "const" for _, t in x.cases(e)) else None


@values("where")
def _where(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if len(n.args) != 3:
        return None
    cond, a, b = (r.operand(n, v, c, m) for v in n.args)
    if b.op == "softmax" and cond is _nan(b) and x.constant_real(a) == 0:
        return x.opaque("nan_to_0", b)
    return x.select(x.truth(cond), r.coerce(n, a), r.coerce(n, b))


@values("masked_fill")
def _masked_fill(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    source, mask, value = n.args[:3]
    fill = r.coerce(n, r.operand(n, value, c, m))
    return x.select(x.truth(r.operand(n, mask, c, m)), fill, r.operand(n, source, c, m))


@values("_to_copy", "to", "type_as")
def _cast(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return converted(r, n, n.args[0], c, m)


def converted(r: Reader, n: Node, source: Node, c: Coords, m: Mode) -> Expr | None:
    """An element of `source` in the dtype of `n`."""
    e = r.read(source, r.align(source, c), m)
    if m is Mode.SCORE and is_real(n) and is_int(source):
        return x.from_int(e)  # a weight; how it is rounded does not matter in real arithmetic
    if dtype(n) == torch.bool or not is_real(source):
        unbounded = is_int(n) and is_int(source) and torch.iinfo(dtype(n)).bits < torch.iinfo(dtype(source)).bits
        return None if unbounded and (math.isinf(e.lo) or math.isinf(e.hi)) else r.coerce(n, e)
    if not is_real(n):
        return None
    narrower = torch.finfo(dtype(n)).eps > torch.finfo(dtype(source)).eps

    def leaf(t: Expr) -> Expr:
        # In a comparison a rounded datum is another datum; on the way to the output, less rounding is allowed.
        return r.leaf(n, c) if narrower and m is Mode.VALUE and t.op not in ("float", "const") else t

    return x.map_cases(e, leaf)


def comparison(op: str, swap: bool, negated: bool):
    def rule(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
        a, b = (_in_common(n, r.operand(n, v, c, Mode.VALUE)) for v in n.args[:2])
        if swap:
            a, b = b, a
        e = compare(r, op, a, b)
        return x.negate(e) if negated and e is not None else e

    return rule


for _names, _op, _swap, _negated in (
    (("eq",), "eq", False, False),
    (("ne", "not_equal"), "eq", False, True),
    (("ge", "greater_equal"), "ge", False, False),
    (("gt", "greater"), "gt", False, False),
    (("le", "less_equal"), "ge", True, False),
    (("lt", "less"), "gt", True, False),
):
    values(*_names)(comparison(_op, _swap, _negated))


def _in_common(n: Node, e: Expr) -> Expr:
    """An operand as torch compares it: converted to the common dtype of both.

    Raises:
        Unreadable: If that rounds an integer.
    """
    a, b = (v.meta["val"] if is_tensor(v) else v for v in n.args[:2])
    if not all(isinstance(v, (torch.Tensor, bool, int, float)) for v in (a, b)):
        return e
    common = torch.result_type(a, b)
    if not common.is_floating_point:
        return e
    e = x.map_cases(_as_real(e), lambda t: x.real(rounded(t.args[0], common)) if t.op == "const" else t)
    if not exact(e, common):
        raise Unreadable(f"{n.name}: integers that {common} cannot hold")
    return e


def compare(r: Reader, op: str, a: Expr, b: Expr) -> Expr | None:
    """``a op b`` of elements of any sorts."""
    if a.sort == b.sort == x.BOOL or op == "eq" and x.BOOL in (a.sort, b.sort) and x.REAL not in (a.sort, b.sort):
        a, b = (x.truth(e) if e.sort == x.BOOL or x.constant(e) in (0, 1) else None for e in (a, b))
        if a is None or b is None:
            return None
        return {"eq": x.iff(a, b), "ge": x.implies(b, a), "gt": x.conj(a, x.negate(b))}[op]
    if x.REAL in (a.sort, b.sort):
        return compare_reals(r, op, *(_as_real(e) for e in (a, b)))
    return x.compare_ints(op, *(x.select(e, x.ONE, x.ZERO) if e.sort == x.BOOL else e for e in (a, b)))


def _as_real(e: Expr) -> Expr:
    return e if e.sort == x.REAL else x.from_int(e) if e.sort == x.INT else x.select(e, x.real(1), x.real(0))


def compare_reals(r: Reader, op: str, a: Expr, b: Expr) -> Expr:
    """Comparison of reals, with the bound of a probability: see `underflows`."""

    def leaf(p: Expr, q: Expr) -> Expr:
        if op in ("gt", "ge") and p.op == "softmax" and q.op == "const" and q.args[0] > 0:
            gone = underflows(r, p, q.args[0])
            return x.conj(x.negate(gone), x.compare_reals(op, p, q))
        return x.compare_reals(op, p, q)

    return x.map_truth(a, lambda p: x.map_truth(b, lambda q: leaf(p, q)))


def underflows(r: Reader, p: Expr, threshold: float) -> Expr:
    """When a probability is certainly below `threshold`.

    softmax(l)_c <= exp(l_c - l_k) for every k; so a logit that is a constant far below another constant of its row has
    a probability below any threshold of ours. With finite fills this is how "masked" is told from "small".
    """
    name, coords = p.args
    node = r.nodes[name]
    source, d = r.softmax_axis(node)
    if source is node or r.is_quotient(node):  # SDPA, and weights of a hand-made softmax: no logits to look at
        return x.FALSE
    here = r.read(source, coords, Mode.VALUE)
    size = r.shape(source)[d]
    highest = -math.inf
    for k in (x.ZERO, x.minus(size, 1)):
        highest = max(highest, _about(r.read(source, coords[:d] + (k,) + coords[d + 1 :], Mode.VALUE), -math.inf))
    margin = math.log(threshold) - 50
    return x.map_truth(here, lambda v: x.boolean(_about(v, math.inf) - highest < margin))


def _about(e: Expr, otherwise: float) -> float:
    """The constant that a leaf is, to within rounding; or at most is, where an upper bound is wanted (`otherwise` is inf)."""
    if e.op == "opaque" and e.args[0] in (("about", "at_most") if otherwise > 0 else ("about",)):
        (e,) = e.args[1]
    return e.args[0] if e.op == "const" else otherwise


@values("bitwise_and", "logical_and", "__and__")
def _and(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.conj(*(x.truth(r.operand(n, v, c, m)) for v in n.args[:2])) if dtype(n) == torch.bool else None


@values("bitwise_or", "logical_or", "__or__")
def _or(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.disj(*(x.truth(r.operand(n, v, c, m)) for v in n.args[:2])) if dtype(n) == torch.bool else None


@values("bitwise_xor", "logical_xor", "__xor__")
def _xor(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if dtype(n) != torch.bool:
        return None
    a, b = (x.truth(r.operand(n, v, c, m)) for v in n.args[:2])
    return x.negate(x.iff(a, b))


@values("bitwise_not", "logical_not")
def _not(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.negate(x.truth(r.read(n.args[0], c, m))) if dtype(n) == torch.bool else None


@values("add", "sub", "rsub", "subtract")
def _add(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a, b = (r.operand(n, v, c, m) for v in n.args[:2])
    k = argument(n, 2, "alpha", 1)
    if not isinstance(k, (int, float)):
        return None
    if op_name(n) == "rsub":
        a, b = b, a  # other - alpha * self
    if op_name(n) != "add":
        k = -k
    if is_int(n):
        return x.plus(r.coerce(n, a), x.times(r.coerce(n, b), k)) if isinstance(k, int) else None
    if dtype(n) == torch.bool:
        return x.disj(x.truth(a), x.truth(b)) if k == 1 else None
    return x.add_reals(r.coerce(n, a), x.scaled(r.coerce(n, b), k))


@values("mul", "multiply")
def _mul(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if r.handmade_softmax(n) is not None:
        return _quotient(r, n, c)
    # Probabilities are read on as an operand; what multiplies them is a mask, or else they are the operand.
    modes = (Mode.FORMULA if m is Mode.OPERAND and is_tensor(v) and not r.is_probability(v) else m for v in n.args[:2])
    a, b = (r.operand(n, v, c, mode) for v, mode in zip(n.args[:2], modes))
    if is_int(n):
        return x.times(r.coerce(n, a), r.coerce(n, b))
    if dtype(n) == torch.bool:
        return x.conj(x.truth(a), x.truth(b))

    a, b = r.coerce(n, a), r.coerce(n, b)

    def leaf(p: Expr, q: Expr) -> Expr:
        if p.op != "const" and q.op != "const" and m is Mode.FORMULA:
            return r.product(n, "mul", c, [(n.args[0], p, p is a), (n.args[1], q, q is b)])
        if q.op == "const":
            p, q = q, p
        if p.op != "const":
            return x.opaque("mul", p, q)
        # 0 * inf is NaN, and 0 * datum is NaN where the datum is not finite: not a mask.
        if q.op == "const":
            return x.real(p.args[0] * q.args[0])
        if x.zero_times(q) is not None and p.args[0] == 0:
            return q
        return x.scaled(q, p.args[0]) if p.args[0] != 0 and math.isfinite(p.args[0]) else x.opaque("mul", p, q)

    product = x.map_cases(a, lambda p: x.map_cases(b, lambda q: leaf(p, q)))
    opened = (t for _, t in x.cases(product) if t.op == "opaque" and t.args[0] == "mul")
    if m is Mode.OPERAND and any(x.zero_times(t) is None for t in opened):
        return None  # probabilities times data are an operand of their own
    return product


@values("exp")
def _exp(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    return x.softmax(n.name, c) if r.handmade_softmax(n) is not None else None


def _quotient(r: Reader, n: Node, c: Coords) -> Expr | None:
    """A softmax by hand."""
    return deferred_softmax(r, n, c) if r.divides_sum(n) else x.softmax(n.name, c)


@values("div", "true_divide", "divide")
def _div(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    if r.handmade_softmax(n) is not None:
        return _quotient(r, n, c)
    if n.kwargs.get("rounding_mode") == "floor" and is_int(n):
        return _floor_divide(r, n, c, m)
    if n.kwargs.get("rounding_mode") is not None or not is_real(n):
        return None
    a, b = (r.coerce(n, r.operand(n, v, c, m)) for v in n.args[:2])
    if b.op == "const" and b.args[0] and math.isfinite(b.args[0]):
        return x.scaled(a, 1 / b.args[0])

    def leaf(p: Expr, q: Expr) -> Expr:
        if p.op == q.op == "const" and q.args[0]:
            return x.real(p.args[0] / q.args[0])
        if m is not Mode.FORMULA:
            return x.opaque("div", p, q)
        return r.product(n, "div", c, [(n.args[0], p, p is a), (n.args[1], q, q is b)])

    return x.map_cases(a, lambda p: x.map_cases(b, lambda q: leaf(p, q)))


@values("reciprocal")
def _reciprocal(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Of numbers other than zero."""
    a = r.coerce(n, r.read(n.args[0], c, m))
    if any(t.op != "const" or not t.args[0] for _, t in x.cases(a)):
        return None
    return x.map_cases(a, lambda t: x.real(1 / t.args[0]))


@values("neg", "negative")
def _neg(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a = r.read(n.args[0], c, m)
    return x.times(a, -1) if is_int(n) else x.scaled(a, -1)


@values("abs", "absolute")
def _abs(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a = r.read(n.args[0], c, m)
    return x.select(x.at_least(a, x.ZERO), a, x.times(a, -1)) if is_int(n) else None


@values("floor_divide")
def _floor_divide(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a, b = (r.operand(n, v, c, m) for v in n.args[:2])
    return x.floordiv(r.coerce(n, a), b) if is_int(n) and b.sort == x.INT and b.lo > 0 else None


@values("__rshift__", "bitwise_right_shift")
def _right_shift(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    k = r.scalar(n.args[1])
    bits = None if k is None else x.constant(k)
    return x.floordiv(r.read(n.args[0], c, m), 2**bits) if is_int(n) and bits is not None and 0 <= bits < 31 else None


@values("remainder", "fmod")
def _remainder(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a, b = (r.operand(n, v, c, m) for v in n.args[:2])
    if not is_int(n) or b.sort != x.INT or b.lo <= 0 or (op_name(n) == "fmod" and a.lo < 0):
        return None
    return x.mod(r.coerce(n, a), b)


@values("clamp", "clamp_min", "clamp_max", "clip")
def _clamp(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Of integers, and of constants."""
    name = op_name(n)
    lo = argument(n, 1, "min") if name != "clamp_max" else None
    hi = argument(n, 1, "max") if name == "clamp_max" else argument(n, 2, "max") if name != "clamp_min" else None
    if not all(v is None or isinstance(v, (int, float) if is_real(n) else int) for v in (lo, hi)):
        return None
    e = r.read(n.args[0], c, m)
    if is_int(n):
        return x.clamp(e, lo, hi)
    if any(t.op != "const" or math.isnan(t.args[0]) for _, t in x.cases(e)):
        return None
    low, high = (other if v is None else rounded(v, dtype(n)) for v, other in ((lo, -math.inf), (hi, math.inf)))
    return x.map_cases(e, lambda t: x.real(min(max(t.args[0], low), high)))


@values("minimum", "maximum")
def _extremum(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Of reals: of two constants, or of a datum and an infinity."""
    a, b = (r.operand(n, v, c, m) for v in n.args[:2])
    if is_int(n):
        return x.select(x.at_least(a, b), *((a, b) if op_name(n) == "maximum" else (b, a)))
    wins, loses = (math.inf, -math.inf) if op_name(n) == "maximum" else (-math.inf, math.inf)

    def leaf(p: Expr, q: Expr) -> Expr:
        if p.op == q.op == "const" and not any(math.isnan(t.args[0]) for t in (p, q)):
            return (max if op_name(n) == "maximum" else min)(p, q, key=lambda t: t.args[0])
        for one, other in ((p, q), (q, p)):
            if one.op == "const" and one.args[0] in (wins, loses):
                return one if one.args[0] == wins else other
        raise Unreadable(f"{n.name}: which of two data is the larger")

    a, b = (r.coerce(n, e) for e in (a, b))
    return x.map_cases(a, lambda p: x.map_cases(b, lambda q: leaf(p, q)))


def _nan(e: Expr) -> Expr:
    return x.predicate("isnan", (e,))


@values("isnan")
def _isnan(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Only of a probability, to see that it is replaced; it decides nothing else."""
    if not r.is_probability(n.args[0]):
        return None
    a = r.read(n.args[0], c, Mode.FORMULA)
    return _nan(a) if a.op == "softmax" else None


@values("log")
def _log(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    """Of a mask: 0 where it is one, -inf where it is zero."""
    a = r.read(n.args[0], c, m)
    if any(t.op != "const" or t.args[0] not in (0, 1) for _, t in x.cases(a)):
        return None
    return x.map_cases(a, lambda t: x.real(0 if t.args[0] else -math.inf))


@values("nan_to_num")
def _nan_to_num(r: Reader, n: Node, c: Coords, m: Mode) -> Expr | None:
    a = r.read(n.args[0], c, m)
    leaves = [t for _, t in x.cases(a)]
    if argument(n, 1, "nan") not in (None, 0, 0.0):
        return None
    if m is Mode.SCORE and not any(x.is_infinite(t) for t in leaves):
        return x.map_cases(a, lambda t: t if t.op == "const" else x.opaque("nan_to_0", t))
    masked = (t is x.real(0) or x.zero_times(t) is not None for t in leaves if t.op != "softmax")
    if not any(t.op == "softmax" for t in leaves) or not all(masked):
        return None
    return x.map_cases(a, lambda t: x.opaque("nan_to_0", t) if t.op == "softmax" else x.real(0))
