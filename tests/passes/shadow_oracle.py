"""Reading checked by numbers: a function is traced like a shadow graph, its result read at every coordinate, and the expression
evaluated on the eager values of the nodes that it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from fsa_compile.passes import expr as x
from fsa_compile.passes.evaluate import TensorEvaluator
from fsa_compile.passes.expr import Expr
from fsa_compile.passes.nodes import op_name
from fsa_compile.passes.reader import MOVES, VALUES, Mode, Reader


class Oracle(TensorEvaluator):
    """`TensorEvaluator` with the reals that only an oracle needs; reals are float64."""

    reader: Reader

    def _const(self, e: Expr) -> Tensor:
        return torch.tensor(e.args[0], dtype=torch.float64)

    def _float(self, e: Expr) -> Tensor:
        return torch.as_tensor(self(e.args[0])).double()

    def _add(self, e: Expr) -> Tensor:
        return self(e.args[0]) + self(e.args[1])

    def _if_real(self, e: Expr) -> Tensor:
        condition, a, b = map(self, e.args)
        return torch.where(condition, a, b)

    def _opaque(self, e: Expr) -> Tensor:
        name, operands = e.args
        values = [self(o) for o in operands]
        if name == "mul":
            return values[0] * values[1]
        if name == "div":
            return values[0] / values[1]
        if name == "at_most":  # the mean of huge negative numbers: in the cases of these tests the sum does overflow
            return torch.full_like(values[0], -torch.inf)
        assert name == "nan_to_0", name
        return values[0].nan_to_num(0.0)

    def _compare(self, e: Expr) -> Tensor:
        op, a, b = e.args[0], self(e.args[1]), self(e.args[2])
        return a == b if op == "eq" else a > b if op == "gt" else a >= b

    def _predicate(self, e: Expr) -> Tensor:
        name, args = e.args
        return self(args[0]).isnan() if name == "isnan" else self.element(name, args)

    def _inside(self, variables: tuple[Expr, ...]) -> Oracle:
        extents = [self.scalar(v.args[1]) for v in variables]
        inner = Oracle([*self.axes, *variables], [*self.extents, *extents], self._tensor, self._shape, self._size_of, self.device)
        inner.reader = self.reader
        return inner

    def _exists(self, e: Expr) -> Tensor:
        inner = self._inside((e.args[0],))
        return torch.as_tensor(inner(e.args[1])).expand([*self._lead(), inner.extents[-1]]).any(-1)

    def _lead(self) -> list[int]:
        return [int(n) for n in self.extents]

    def _dot(self, e: Expr) -> Tensor:
        variables, factors = e.args
        inner = self._inside(variables)
        product = torch.ones((), dtype=torch.float64)
        for f in factors:
            product = product * inner(f)
        product = product.expand([int(n) for n in inner.extents])
        return product.flatten(len(self.axes)).sum(-1) if variables else product

    def _softmax(self, e: Expr) -> Tensor:
        name, coords = e.args
        node = self.reader.nodes[name]
        if op_name(node) != "scaled_dot_product_attention":
            return self.element(name, coords)
        # SDPA keeps its probabilities to itself: read its logits over a fresh key axis and normalise them here.
        *lead, key = coords
        k = x.var("oracle.key", self.reader.shape(node.args[1])[-2])
        inner = self._inside((x.as_var(k),))  # type: ignore[arg-type]
        logits = inner(self.reader.logit(node, (*lead, k))).expand([int(n) for n in inner.extents])
        weights = torch.softmax(logits, -1).nan_to_num(0.0)
        index = torch.as_tensor(self(key)).expand(self._lead())
        return weights.gather(-1, index.unsqueeze(-1)).squeeze(-1)


class Values(fx.Interpreter):
    """Runs a graph on real tensors and keeps every value, by node name."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.by_name: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.by_name[n.name] = value
        return value


@dataclass
class Reading:
    """What reading a function's result gave.

    Attributes:
        reader: The reader.
        node: The node that holds the result.
        expression: Its element at the variables `axes`.
        axes: The coordinates.
        eager: What the function returned.
        values: Value of every node, by name.
    """

    reader: Reader
    node: Node
    expression: Expr
    axes: tuple[Expr, ...]
    eager: Tensor
    values: dict[str, Any]

    @property
    def is_leaf(self) -> bool:
        """Whether nothing was read: the expression is the node's own element."""
        atom = x.as_atom(self.expression) if self.expression.sort == x.INT else self.expression
        return atom is not None and atom.op in ("load", "apply", "predicate") and atom.args == (self.node.name, self.axes)

    def evaluate(self, e: Expr) -> Tensor:
        """`e` over the coordinates of the result; loads are eager values."""
        shape = [int(s) for s in self.eager.shape]
        # A dimension of size one has the constant coordinate 0.
        present = [(x.as_var(a), s) for a, s in zip(self.axes, shape) if x.as_var(a) is not None]
        oracle = Oracle(
            [a for a, _ in present],
            [s for _, s in present],
            self._tensor,
            self._shape,
            lambda name: self.reader.sizes.hints[name],
            torch.device("cpu"),
        )
        oracle.reader = self.reader
        value = torch.as_tensor(oracle(e)).expand([s for _, s in present])
        return value.reshape(shape)

    def _tensor(self, name: str) -> Tensor:
        value = self.values[name]
        if name in self.reader.tops and isinstance(value, tuple):
            value = value[1]
        if value.dtype == torch.bool:
            return value
        return value.double() if value.is_floating_point() else value.long()

    def _shape(self, name: str) -> tuple[Expr, ...]:
        return tuple(x.integer(int(s)) for s in self._tensor(name).shape)

    def check(self) -> None:
        """The expression is the eager result: exactly for integers and truths, to the rounding of its dtype for reals."""
        got = self.evaluate(self.expression)
        want = self.eager
        if want.is_floating_point():
            # A float64 sum of a few products of float32 data: a handful of roundings of the eager result's dtype.
            tolerance = 64 * torch.finfo(want.dtype).eps
            torch.testing.assert_close(
                got,
                want.double(),
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda m: f"read as {self.expression}\n{m}",
            )
        else:
            assert torch.equal(got.long(), want.long()), f"read as {self.expression}\n got {got.tolist()}\nwant {want.tolist()}"


def shadow_of(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> GraphModule:
    """The functional pre-dispatch graph of `fn`, made the way `passes/shadow.py` makes it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t) for t in inputs]
    with mode, enable_python_dispatcher():
        functional = dispatch_functionalize(fn, FunctionalTensorMode(pre_dispatch=True, export=True))
        return make_fx(functional, pre_dispatch=True, tracing_mode="real")(*fakes)


def read_result(fn: Callable[..., Tensor], *inputs: Tensor, mode: Mode = Mode.FORMULA) -> Reading:
    """Trace `fn`, read its only result everywhere, and run it eagerly."""
    gm = shadow_of(fn, inputs)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    node = output.args[0]
    node = node[0] if isinstance(node, (tuple, list)) else node
    reader = Reader(gm)
    axes = tuple(x.var(f"c{k}", s) if s is not x.ONE else x.ZERO for k, s in enumerate(reader.shape(node)))
    expression = reader.read(node, axes, mode)
    run = Values(gm)
    run.run(*inputs)
    return Reading(reader, node, expression, axes, fn(*inputs), run.by_name)


def read_call(op: Callable[..., Tensor], *args: Any) -> Reading:
    """The reading of one call of an aten op, for ops that functionalisation takes apart when a function is traced."""
    graph = fx.Graph()

    def placeholder(t: Tensor) -> Node:
        n = graph.placeholder(f"t{len(graph.nodes)}")
        n.meta["val"] = t
        return n

    node = graph.call_function(op, tree_map_only(Tensor, placeholder, args))
    eager = node.meta["val"] = op(*args)
    graph.output(node)
    reader = Reader(GraphModule(torch.nn.Module(), graph))
    axes = tuple(x.var(f"c{k}", s) if s is not x.ONE else x.ZERO for k, s in enumerate(reader.shape(node)))
    values = {n.name: n.meta["val"] for n in graph.nodes if "val" in n.meta}
    return Reading(reader, node, reader.read(node, axes), axes, eager, values)


def ops_of(gm: GraphModule) -> set[str]:
    """The names of the ops in a graph that have a rule."""
    return {op_name(n) for n in gm.graph.nodes} & (set(MOVES) | set(VALUES))
