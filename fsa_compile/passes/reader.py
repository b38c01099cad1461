"""Reading a graph at symbolic coordinates: what is the element of this node at these coordinates?

`Reader.read(node, coords)` answers with an expression. One rule per op, in two tables:

* a *move* rule says where the element comes from: a source node, new coordinates, and perhaps a guard with a fill value
  (padding). Views, permutations, slices, gathers.
* a *value* rule computes: comparisons, arithmetic, reductions, contractions.

An op without a rule, or a rule that returns None, makes the node a leaf: an opaque datum at the coordinates reached.
Leaves are sound; they only prove less. To add an op, add a rule to a module of `passes/rules/`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from . import expr as x
from . import handmade
from .buffers import Buffer
from .closed_form import ClosedForm, fit
from .expr import Expr
from .nodes import axis, constant_factor, dtype, exact, is_real, is_tensor, literal, op_name, rank, rounded
from .sizes import Sizes

Coords = tuple[Expr, ...]


class Unreadable(Exception):
    """A rule met an argument that has no expression (a symbolic float, say): the node becomes a leaf."""


class Mode(enum.Enum):
    """How far reading looks through a real-valued node."""

    FORMULA = "formula"
    """Logits and masks: arithmetic is opened."""
    OPERAND = "operand"
    """Q, K and V: only index ops and constant factors are opened, everything else is the operand."""
    VALUE = "value"
    """Inside a comparison, where no gradient flows: as FORMULA, and `detach` is transparent too."""
    SCORE = "score"
    """What a top-k ranks: as VALUE, but arithmetic on data and sums of it are kept, as far as they are sums of probabilities."""


class Move(NamedTuple):
    """Where an element comes from.

    Attributes:
        source: The node that holds it.
        coords: Where it stands there.
        guard: When it comes from there at all.
        fill: The constant that it is otherwise.
    """

    source: Node
    coords: Coords
    guard: Expr = x.TRUE
    fill: float = 0.0


MoveRule = Callable[["Reader", Node, Coords], "Move | None"]
ValueRule = Callable[["Reader", Node, Coords, Mode], "Expr | None"]
CASTS = ("_to_copy", "to", "type_as")
"""Ops that may change the dtype: a move for an operand (the rewrite repeats the cast), a value rule otherwise."""
CREATIONS = (
    "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor",
)  # fmt: skip
NAMED = ("nan_to_0", "about", "at_most")
"""Opaque reals that rules know by name."""
SOFTMAXES = ("softmax", "_softmax", "_safe_softmax", "special_softmax")
HANDMADE = ("div", "mul", "exp")
"""Ops that give probabilities where `handmade` says so."""
FUSED: dict[str, Callable[["Reader", Node, Coords], Expr]] = {}
"""Ops that are a whole attention ``(q, k, v, ...)``, with the rule for their logits at (..., query, key)."""
MOVES: dict[str, MoveRule] = {}
VALUES: dict[str, ValueRule] = {}


def moves(*names: str) -> Callable[[MoveRule], MoveRule]:
    """Registers a move rule for the aten ops `names`."""

    def register(rule: MoveRule) -> MoveRule:
        MOVES.update(dict.fromkeys(names, rule))
        return rule

    return register


def fused(name: str) -> Callable[[Callable[[Reader, Node, Coords], Expr]], Callable[[Reader, Node, Coords], Expr]]:
    """Registers the rule for the logits of an op that is a whole attention."""

    def register(rule: Callable[[Reader, Node, Coords], Expr]) -> Callable[[Reader, Node, Coords], Expr]:
        FUSED[name] = rule
        return rule

    return register


def values(*names: str) -> Callable[[ValueRule], ValueRule]:
    """Registers a value rule for the aten ops `names`."""

    def register(rule: ValueRule) -> ValueRule:
        VALUES.update(dict.fromkeys(names, rule))
        return rule

    return register


class Reader:
    """Reads one shadow graph; answers are memoised.

    Args:
        graph_module: The graph.
        buffers: By the name of a placeholder: the buffer that it is, whose value may be read.
        place: From the name of a node to what the user calls it, and to the line where it stands.
        sizes: What is known of the graph's sizes.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        buffers: Mapping[str, Buffer] = MappingProxyType({}),
        place: Callable[[str], tuple[str, str | None]] = lambda name: (name, None),
        sizes: Sizes | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.buffers, self.place = buffers, place
        self.relied: dict[str, Buffer] = {}
        """The buffers whose value was read: what is concluded holds only for it."""
        self.sizes = Sizes() if sizes is None else sizes
        self.nodes = {n.name: n for n in graph_module.graph.nodes}
        self.operands: dict[Expr, tuple[tuple[Node | None, Coords], ...]] = {}
        """For each contraction: its factors as (node, coordinates)."""
        self.products: dict[Expr, tuple[tuple[Node, Coords] | None, ...]] = {}
        """For each product or quotient that was not opened: where its two factors were read, each as one value."""
        self.sums: dict[Expr, tuple[Node, Coords]] = {}
        """For each contraction that is compared: the element of the graph that it is."""
        self.tops: dict[str, tuple[Node, int]] = {}
        """For each top-k or sort whose indices were read: its node and axis, by name."""
        self.unread: dict[str, int] = {}
        """How often an op had no rule that applied."""
        self.origins: dict[Expr, list[tuple[Node, Coords]]] = {}
        """For each integer or truth that depends on data: the nodes that were read as it, outermost first."""
        self._memo: dict[tuple, Expr] = {}
        self._shapes: dict[Node, tuple[Expr, ...]] = {}
        self.free_of_data: dict[Node, bool] = {}
        """Real tensors that were asked for whether they are computed from real data."""
        self._probabilities: dict[Node, bool] = {}
        self._literals: dict[Node, ClosedForm | None] = {}
        self._handmade: dict[Node, handmade.Normalised | None] = {}

    # -- sizes
    def shape(self, n: Node) -> tuple[Expr, ...]:
        s = self._shapes.get(n)
        if s is None:
            s = self._shapes[n] = self.sizes.shape(n.meta["val"])
        return s

    def scalar(self, v: Any) -> Expr | None:
        """An integer argument of a call (a number, or the node of a symbolic one) as an expression."""
        if isinstance(v, bool):
            return None
        if isinstance(v, (int, torch.SymInt)):
            return self.sizes.of(v)
        if isinstance(v, Node) and isinstance(v.meta.get("val"), (int, torch.SymInt)):
            return self.sizes.of(v.meta["val"])
        return None

    def align(self, source: Node, coords: Sequence[Expr]) -> Coords:
        """Coordinates of a broadcast result as coordinates of one of its operands."""
        s = self.shape(source)
        c = tuple(coords)[len(coords) - len(s) :]
        return tuple(x.ZERO if k is x.ONE else q for k, q in zip(s, c))

    # -- reading
    def read(self, n: Node, coords: Sequence[Expr], mode: Mode = Mode.FORMULA) -> Expr:
        """The element of `n` at `coords`.

        Args:
            n: A tensor-valued node of the graph.
            coords: One integer expression per dimension.
            mode: How far to look through real-valued nodes.
        """
        coords = tuple(coords)
        if len(coords) != rank(n):
            raise ValueError(f"read: {n.name} has {rank(n)} dimensions, got {len(coords)} coordinates")
        if not is_real(n):
            mode = Mode.VALUE
        key = (n, coords, mode)
        r = self._memo.get(key)
        if r is None:
            r = self._memo[key] = self._read(n, coords, mode)
            if not is_real(n) and r.free:
                self.origins.setdefault(r, []).insert(0, (n, coords))
        return r

    def _read(self, n: Node, coords: Coords, mode: Mode) -> Expr:
        name = op_name(n)
        step = self.move(n, coords, mode)
        if step is not None:
            if step.guard is x.FALSE:
                return literal(step.fill, dtype(n))
            inner = self.read(step.source, step.coords, mode)
            if mode is Mode.SCORE and step.fill == 0 and step.guard is not x.TRUE and inner.op != "if_real":
                # A padded summand counts or not: no case of the whole sum, of which there would be two to the number of summands.
                return x.dot((), (x.select(step.guard, x.real(1), x.real(0)), inner))
            return inner if step.guard is x.TRUE else x.select(step.guard, inner, literal(step.fill, dtype(n)))
        if name in VALUES and (mode is not Mode.OPERAND or self.transparent_operand(n)):
            try:
                r = VALUES[name](self, n, coords, mode)
            except Unreadable:
                r = None
            if r is not None and is_real(n):
                r = self._settle(r, n, coords, mode)
            if r is not None and (mode is Mode.SCORE or exact(r, dtype(n))):
                return r
        if n.name in self.buffers and not (is_real(n) and mode is Mode.OPERAND):
            form = self.buffers[n.name].content.form
            if form is not None:
                self.relied[n.name] = self.buffers[n.name]
                return form.at(coords)
        if name:
            self.unread[name] = self.unread.get(name, 0) + 1
        if n.op == "get_attr":
            constant = _small_constant(self.graph_module, n)
            if constant is not None:
                return literal(constant, dtype(n))
            if n not in self._literals:
                self._literals[n] = _literal_form(self.graph_module, n)
            form = self._literals[n]
            if form is not None:
                return form.at(coords)
        return self.leaf(n, coords)

    def _settle(self, e: Expr, n: Node, coords: Coords, mode: Mode) -> Expr:
        """What floating point makes of a value: constants are rounded, and inexact arithmetic that is compared is opaque."""

        def leaf(t: Expr) -> Expr:
            if t.op == "const":
                return x.real(rounded(t.args[0], dtype(n)))
            if mode is Mode.SCORE:
                return t
            if t.op == "dot" and mode is Mode.VALUE:
                self.sums.setdefault(t, (n, coords))
            if t.op in ("scaled", "add", "opaque") and not x.is_infinite(t) and t.args[0] not in NAMED:
                counts = any(y.op == "float" for y in x.walk(t))  # arithmetic on positions that is not exact
                return self.leaf(n, coords) if counts or mode is Mode.VALUE else t
            return t

        return x.map_cases(e, leaf)

    def move(self, n: Node, coords: Coords, mode: Mode) -> Move | None:
        """The applicable move at `n`, if its op is one and keeps the kind of its elements."""
        name = op_name(n)
        rule = MOVES.get(name)
        if rule is None or name == "detach" and is_real(n) and mode not in (Mode.VALUE, Mode.SCORE):
            return None
        step = rule(self, n, coords)
        if step is None or dtype(n) == dtype(step.source):
            return step
        # Another dtype is another value, but for an operand: the rewrite repeats the casts of those.
        both_real = is_real(n) and is_real(step.source)
        return step if name in CASTS and both_real and mode is Mode.OPERAND else None

    def leaf(self, n: Node, coords: Coords) -> Expr:
        if dtype(n) == torch.bool:
            return x.predicate(n.name, coords)
        if is_real(n):
            return x.load(n.name, coords)
        info = torch.iinfo(dtype(n))
        return x.apply(n.name, coords, 0 if info.min == 0 else -x.INF)

    def operand(self, n: Node, v: Any, coords: Coords, mode: Mode) -> Expr:
        """An argument of the pointwise op `n`: a broadcast tensor or a number."""
        if is_tensor(v):
            return self.read(v, self.align(v, coords), mode)
        size = self.scalar(v)
        if size is not None:
            return size
        if isinstance(v, bool):
            return x.boolean(v)
        if isinstance(v, float):
            return x.real(v)
        raise Unreadable(f"{n.name}: argument {v!r}")

    def coerce(self, n: Node, e: Expr) -> Expr:
        """`e` as an element of the dtype of `n`."""
        if dtype(n) == torch.bool:
            return x.truth(e)
        if is_real(n):
            if e.sort == x.BOOL:
                return x.select(e, x.real(1), x.real(0))
            if e.sort == x.INT:
                e = x.from_int(e)
                if not exact(e, dtype(n)):
                    raise Unreadable(f"{n.name}: integers that {dtype(n)} cannot hold")
            return e
        if e.sort == x.BOOL:
            return x.select(e, x.ONE, x.ZERO)
        if e.sort == x.INT:
            return e
        raise Unreadable(f"{n.name}: a real made an integer")

    # -- operands
    def transparent_operand(self, n: Node) -> bool:
        """Whether an operand is read through `n`: contractions, probabilities, and products with a constant."""
        name = op_name(n)
        if name == "exp":
            return self.handmade_softmax(n) is not None
        if name in ("div", "mul") and (constant_factor(n) is not None or self.handmade_softmax(n) is not None):
            return True
        if name in ("masked_fill", "where", "mul"):
            return self.is_probability(n)
        return name in (*SOFTMAXES, *CREATIONS, "nan_to_num", "getitem")

    def is_probability(self, n: Node) -> bool:
        """Whether a node holds the result of a softmax, moved, masked or multiplied."""
        if n not in self._probabilities:
            name = op_name(n)
            if name in SOFTMAXES or name in HANDMADE and self.handmade_softmax(n) is not None:
                return True
            through = name in MOVES or name in ("nan_to_num", "masked_fill")
            sources = n.args[1:] if name == "where" else n.args[:2] if name == "mul" else n.args[:1] if through else ()
            self._probabilities[n] = any(is_tensor(a) and self.is_probability(a) for a in sources)
        return self._probabilities[n]

    # -- softmax
    def handmade_softmax(self, n: Node) -> tuple[Node, int] | None:
        """What the quotient or exponential `n` normalises: (weights ``e = exp(y)`` or logits, axis), or None."""
        found = self.normalised(n)
        return None if found is None else (found.weights, found.axis)

    def normalised(self, n: Node) -> handmade.Normalised | None:
        """The softmax by hand that `n` is, or None."""
        if op_name(n) not in HANDMADE:
            return None
        if n not in self._handmade:
            self._handmade[n] = handmade.match(self, n)
        return self._handmade[n]

    def is_quotient(self, n: Node) -> bool:
        """Whether `n` is a softmax by hand that divides weights, or a sum of values, by their sum."""
        found = self.normalised(n)
        return found is not None and found.numerator is not None

    def divides_sum(self, n: Node) -> bool:
        """Whether the division `n` normalises after the values were summed: ``(e @ v) / e.sum()``."""
        found = self.normalised(n)
        return found is not None and found.deferred

    def softmax_axis(self, n: Node) -> tuple[Node, int]:
        """What a softmax node normalises: (logits or weights, axis). For SDPA the node itself and its key axis."""
        name = op_name(n)
        if name in HANDMADE:
            found = self.handmade_softmax(n)
            assert found is not None
            return found
        if name in FUSED:
            return n, rank(n) - 1
        return n.args[0], axis(n.args[1], rank(n))

    def logit(self, n: Node, coords: Coords) -> Expr:
        """The logit behind element `coords` of the probabilities of node `n`."""
        name = op_name(n)
        if name in FUSED:
            return FUSED[name](self, n, coords)
        source, _ = self.softmax_axis(n)
        return handmade.logit(self, source, coords) if self.is_quotient(n) else self.read(source, coords, Mode.FORMULA)

    def product(self, n: Node, name: str, c: Coords, factors: Sequence[tuple[Any, Expr, bool]]) -> Expr:
        """An opaque product ("mul") or quotient ("div") of two reals, remembered with the places of its factors.

        Args:
            n: The node that computes it.
            name: Which of both.
            c: The coordinates in `n`.
            factors: For each: the argument of `n`, its value, and whether it has this value everywhere.
        """
        e = x.opaque(name, *(value for _, value, _ in factors))
        self.products[e] = tuple(
            (v, self.align(v, c)) if everywhere and is_tensor(v) and is_real(v) else None for v, _, everywhere in factors
        )
        return e

    def contraction(self, variables: Sequence[Expr], factors: Sequence[tuple[Node | None, Coords, Expr]]) -> Expr:
        """``sum over variables of the product of the factors``, remembered with its operands."""
        bound = tuple(v for v in (x.as_var(v) for v in variables) if v is not None)
        e = x.dot(bound, [f for _, _, f in factors])
        self.operands[e] = tuple((n, c) for n, c, _ in factors)
        return e


def _small_constant(gm: GraphModule, n: Node) -> Any:
    """The value of a one-element tensor constant that tracing baked in."""
    if n.meta["val"].numel() != 1:
        return None
    t = getattr(gm, str(n.target), None)
    t = getattr(t, "constant", t) if type(t).__name__ == "FakeTensor" else t
    return t.item() if type(t) is torch.Tensor and t.device.type != "meta" else None


def _literal_form(gm: GraphModule, n: Node) -> ClosedForm | None:
    """The closed form of ``torch.tensor([...])``, which tracing bakes in and copies at each use."""
    t = getattr(gm, str(n.target), None)
    if type(t) is not torch.Tensor or t.device.type == "meta" or any(op_name(u) != "lift_fresh_copy" for u in n.users):
        return None
    return fit(t)


def load_rules() -> None:
    """Fills the tables; rule modules register themselves on import."""
    from .rules import contraction, expansion, flex, index, membership, pointwise, reduction  # noqa: F401


load_rules()
