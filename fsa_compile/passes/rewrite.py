"""Putting the ops into the Dynamo graph: the only module that mutates a graph.

For each match, in front of the node that held the output: views that turn the user's tensors into canonical ones, the list
of blocks where the role has one, the pattern's own `build`, the value of empty rows, and the view back. Then the old output
is replaced, and what only it needed is removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import sympy
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from ..registry.pattern import Tensors
from ..report import ReasonKind
from . import dynamo_graph as dg
from . import expr as x
from .classify import Match
from .evaluate import TensorEvaluator
from .expr import Expr
from .legality import ListTensor, Placement
from .nodes import picked
from .profit import operand_dtype
from .ranking import MaximumRanking, ProbabilityRanking
from .reader import Reader
from .refusal import Refusal

if TYPE_CHECKING:
    from .judge import Fusion

_RANDOM = ("dropout", "rand", "randn", "bernoulli", "multinomial", "normal", "uniform", "rrelu", "gumbel")


Inspect = Callable[[Sequence[Node], Node], None]


class Emission(Exception):
    """A site could not be written down; the graph is as it was before. `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Rewriter:
    """Rewrites the sites of one Dynamo graph.

    Args:
        graph: The Dynamo graph.

    Attributes:
        r: Reader of the shadow in which the site was found that is being written.
        replaced: What stands for the outputs of sites now.
    """

    r: Reader

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tracer = GraphAppendingTracer(graph)
        self.replaced: dict[Node, Node] = {}
        self._written: dict[Node, list[Node]] = {}

    def rewrite(self, match: Match, placement: Placement, inspect: Inspect | None = None) -> None:
        """Replaces one site.

        Args:
            match: What it is.
            placement: Where it is.
            inspect: Called with the new nodes and the one that takes the place of the output, before it does.

        Raises:
            Emission: If the new nodes could not be made, or `inspect` raised; they are gone again.
        """
        self.r = match.reader
        last = placement.output.prev
        try:
            with self.graph.inserting_before(placement.output):
                new = self._emit(match, placement)
            written = _nodes_between(last, placement.output)
            if inspect is not None:
                inspect(written, new)
        except Exception as cause:
            while placement.output.prev is not last:
                self.graph.erase_node(placement.output.prev)
            raise Emission(cause) from cause
        _blame(written, placement.output)
        new.meta["example_value"] = placement.output.meta.get("example_value")
        self._written[placement.output] = written
        placement.output.replace_all_uses_with(new)
        self.replaced[placement.output] = new
        self._remove_dead(placement.output)

    def fuse_selection(self, match: Match, placement: Placement, fusion: Fusion, inspect: Inspect | None = None) -> None:
        """Replaces the list of a rewritten selected site by an op that makes it, and with the list what only it needed.

        Args:
            match, placement: The selected site.
            fusion: The op. It stands behind the op of the compressed branch, if it ranks by its probabilities.
            inspect: Called with the nodes that compute the output and the output, when the new list is in its place.

        Raises:
            Emission: If the new nodes could not be made, or `inspect` raised; the list is the model's again.
        """
        self.r = match.reader
        last = end = None
        try:
            target = self._op_of(placement.output, torch.ops.fsa.selected_attention)
            around = [placement.output]
            if isinstance(fusion.ranking, ProbabilityRanking):
                assert fusion.compressed is not None
                source = self._op_of(fusion.compressed.output, torch.ops.fsa.compressed_attention)
                order = {n: p for p, n in enumerate(self.graph.nodes)}
                if order[source] > order[target]:
                    raise Refusal(ReasonKind.SCORES, "the compressed branch is computed after the selected one")
                old, last, end = target.args[3], source, source.next
                around.append(fusion.compressed.output)
            else:
                source, old, last, end = target, target.args[3], target.prev, target
            with self.graph.inserting_before(end):
                if isinstance(fusion.ranking, ProbabilityRanking):
                    new = self._select_blocks(match, fusion.ranking, source)
                else:
                    new = self._select_blocks_by_max(match, fusion.ranking, fusion.place.operands[-2:], target)
            written = _nodes_between(last, end)
            target.update_arg(3, new)
            if inspect is not None:
                used = {*written, *(n for o in around for n in self._written[o])}
                inspect([n for n in self.graph.nodes if n in used], self.replaced[placement.output])
        except Exception as cause:
            if last is not None and end is not None:
                target.update_arg(3, old)
                while end.prev is not last:
                    self.graph.erase_node(end.prev)
            raise Emission(cause) from cause
        _blame(written, source)
        assert isinstance(old, Node)
        self._remove_dead(old)

    def _op_of(self, output: Node, op: Any) -> Node:
        """The op that the site with that output was rewritten to."""
        found = [n for n in self._written.get(output, ()) if n.target is op]
        if len(found) != 1:
            raise Refusal(ReasonKind.SCORES, f"the other branch is no {op}")
        return found[0]

    def _select_blocks_by_max(self, match: Match, found: MaximumRanking, nodes: Sequence[Node], before: Node) -> Node:
        sizes = _SizeValues(self.r, before, self._proxy)
        b, n, m = (sizes(s) for s in (match.form.sizes[0], match.form.sizes[2], match.form.keys))
        dtype = torch.promote_types(found.q.dtype, found.k.dtype)
        operands = []
        for node, operand, heads, length in zip(nodes, (found.q, found.k), found.heads, (n, m)):
            value = dg.value(node)
            assert isinstance(value, torch.Tensor)
            t = operand.layout.to_canonical(self._proxy(node), (b, heads, length, value.shape[-1]))
            operands.append(t if value.dtype == dtype else t.to(dtype))
        sizes_of_list = found.block_size, found.top_k, found.n_init, found.n_local
        return self._create(torch.ops.fsa.select_blocks_by_max, *operands, *sizes_of_list, 0).node

    def _select_blocks(self, match: Match, found: ProbabilityRanking, compressed: Node) -> Node:
        q, k, _, scale, stride, last, prefix, offset = compressed.args
        lse = self._create(operator.getitem, Proxy(compressed, self.tracer), 1)
        n_keys = _SizeValues(self.r, compressed, self._proxy)(match.form.keys)
        sizes = found.kernel_size, found.block_size, n_keys, found.top_k, found.n_init, found.n_local
        operands = (Proxy(n, self.tracer) for n in (q, k))  # type: ignore[arg-type]
        return self._create(torch.ops.fsa.select_blocks, *operands, lse, scale, stride, last, prefix, *sizes, offset).node

    # -- emission
    def _proxy(self, n: Node) -> Proxy:
        while n in self.replaced:
            n = self.replaced[n]
        return Proxy(n, self.tracer)

    def _emit(self, match: Match, placement: Placement) -> Node:
        form = match.form
        sizes = _SizeValues(self.r, placement.output, self._proxy)
        b, hq, n, dk, dv = map(sizes, form.sizes)
        m, hkv = sizes(form.keys), form.kv_heads
        dtype = operand_dtype(match)

        def canonical(node: Node, operand: Any, shape: Sequence[Any]) -> Any:
            t = operand.layout.to_canonical(self._proxy(node), shape)
            value = dg.value(node)
            assert isinstance(value, torch.Tensor)
            return t if value.dtype == dtype else t.to(dtype)

        q = canonical(placement.q, form.q, (b, hq, n, dk))
        tensors = Tensors(
            q=self._at_temperature(q, match, placement, sizes),
            k=canonical(placement.k, form.k, (b, hkv, m, dk)),
            v=canonical(placement.v, form.v, (b, hkv, m, dv)),
            scale=form.scale,
            indices=self._block_list(placement, sizes),
        )
        result = match.pattern.build(match.candidate, tensors)
        out, lse = (result[0], result[1]) if match.pattern.returns_lse else (result, None)
        out = _fill_empty_rows(out, lse, tensors, match, hq // hkv)
        value = dg.value(placement.output)
        assert isinstance(value, torch.Tensor)
        if value.dtype != dtype:
            out = out.to(value.dtype)
        shape = [sizes(s) for s in self.r.shape(self.r.nodes[form.output])]
        return _in_memory_like(value, form.output_layout.from_canonical(out, (b, hq, n, dv), shape)).node

    def _at_temperature(self, q: Any, match: Match, placement: Placement, sizes: _SizeValues) -> Any:
        """`q` ``(b, hq, n, d)`` times or divided by the factors of its logits, rounded to its dtype once each."""
        form = match.form
        nodes = {t.node: n for t, n in zip(form.temperatures, placement.temperatures)}
        axes = [x.as_var(e) or x.as_var(x.var(f"unit{k}", 2)) for k, e in enumerate((form.b, form.h, form.i))]
        evaluate = TensorEvaluator(
            axes,  # type: ignore[arg-type]
            [sizes(s) for s in form.sizes[:3]],
            tensor=lambda name: self._proxy(nodes[name]),
            shape=lambda name: self.r.shape(self.r.nodes[name]),
            size=sizes.symbol,
            device=dg.value(placement.q).device,  # type: ignore[union-attr]
            create=self._create,
        )
        for t in form.temperatures:
            factor = evaluate.element(t.node, t.coords).unsqueeze(-1)
            q = (q / factor if t.inverse else q * factor).to(operand_dtype(match))
        return q

    def _block_list(self, placement: Placement, sizes: _SizeValues) -> Any:
        """The ``(b, hkv or hq, n, t)`` block numbers, -1 where a slot does not count."""
        segments = [self._segment(segment, placement, sizes) for segment in placement.blocks]
        if not segments:
            return None
        return segments[0] if len(segments) == 1 else self._create(torch.cat, segments, dim=-1)

    def _segment(self, segment: ListTensor, placement: Placement, sizes: _SizeValues) -> Any:
        extents = [sizes(s) for s in segment.sizes]
        device = dg.value(placement.q).device  # type: ignore[union-attr]
        evaluate = TensorEvaluator(
            segment.axes,
            extents,
            tensor=lambda name: self._data(placement.data[name]),
            shape=self._data_shape,
            size=sizes.symbol,
            device=device,
            create=self._create,
        )
        out = evaluate(segment.entry)
        if isinstance(out, int):
            out = self._create(torch.full, [1, 1, 1, 1], out, device=device)
        return out.expand(extents)

    def _data(self, n: Node) -> Proxy:
        """A tensor that the block list reads; small integers are widened, so that arithmetic on them does not wrap."""
        proxy, value = self._proxy(n), dg.value(n)
        narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
        return proxy.to(torch.int64) if narrow else proxy

    def _data_shape(self, name: str) -> Sequence[Expr]:
        node = self.r.nodes[name]
        if name in self.r.tops:
            return self.r.sizes.shape(picked(node))
        return self.r.shape(node)

    def _create(self, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", factory, args, kwargs)

    # -- removal
    def _remove_dead(self, n: Node) -> None:
        todo, gone = [n], set()
        while todo:
            dead = todo.pop()
            if dead in gone or dead.users or not dg.is_call(dead) or self._has_effect(dead):
                continue
            inputs = dead.all_input_nodes
            self.graph.erase_node(dead)
            gone.add(dead)
            todo.extend(inputs)

    @staticmethod
    def _has_effect(n: Node) -> bool:
        name = dg.target_name(n)
        called = dg.is_higher_order(n) and not dg.is_flex(n)
        return called or n.is_impure() or dg.writes(n) or dg.switches_mode(n) or name.startswith(_RANDOM)


def _nodes_between(first: Node, end: Node) -> list[Node]:
    nodes = []
    node = first.next
    while node is not end:
        nodes.append(node)
        node = node.next
    return nodes


def _blame(nodes: Sequence[Node], origin: Node) -> None:
    """New nodes stand for the user's line that `origin` stands for."""
    for node in nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in origin.meta and key not in node.meta:
                node.meta[key] = origin.meta[key]


def _fill_empty_rows(out: Any, lse: Any, tensors: Tensors, match: Match, groups: int) -> Any:
    """Give rows that see no key the value and the gradient that the user's code gives them."""
    if match.empty_value in (None, "zero"):
        return out
    if lse is None:
        raise Refusal(ReasonKind.EMPTY_ROWS, f"a query may see no key, and pattern {match.pattern.name!r} returns no log-sum-exp")
    empty = (lse == float("-inf")).unsqueeze(-1)
    v = tensors.v
    poisoned = match.empty_value in ("poison", "poisoned zero")
    if match.empty_value in ("mean", "even"):
        fill = v.mean(2, keepdim=True)
    elif match.empty_value == "poisoned zero":
        fill = tensors.k.mean((2, 3), keepdim=True)
    else:
        # Eager NaN probabilities multiply every value: forward NaN in this row, gradient NaN in all values.
        fill = v.sum(2, keepdim=True)
    if match.empty_value == "poison":
        fill = fill + tensors.k.mean((2, 3), keepdim=True)
    if groups > 1:
        fill = fill.repeat_interleave(groups, 1)
    if poisoned:
        fill = fill + tensors.q.mean(-1, keepdim=True)
    if match.empty_value == "even":
        fill = fill + _even_gradient(tensors, match, groups)
    if match.empty_value in ("nan", "poison"):
        fill = fill * torch.where(empty, float("nan"), 0.0).to(operand_dtype(match))
    if match.empty_value == "poisoned zero":  # the root of 0 is 0, and its derivative times 0 is NaN
        fill = torch.where(empty, fill * 0.0, 1.0).sqrt()
    return torch.where(empty, fill, out)


def _even_gradient(t: Tensors, match: Match, groups: int) -> Any:
    """Zeros ``(b, hq, n, dv)`` with the gradient for q and k that a softmax of m equal logits has.

    There the derivative of the output by logit j is ``(v_j - mean of v) / m``, so that of ``softmax(scale * <q, k_j>) @ v`` is that
    of ``scale * q @ (k.T @ (v - mean of v) / m)`` with v held fixed.
    """
    centred = (t.v - t.v.mean(2, keepdim=True)).detach()
    moments = (t.k.transpose(-1, -2) @ centred) * (match.form.scale / t.k.shape[2])
    slope = t.q @ (moments.repeat_interleave(groups, 1) if groups > 1 else moments)
    return slope - slope.detach()


def _in_memory_like(value: torch.Tensor, out: Any) -> Any:
    """`out` with the strides of the tensor that it replaces: the user's code goes on with views that need them."""
    left = [d for d in range(value.dim()) if not (isinstance(value.shape[d], int) and value.shape[d] == 1)]
    extent, order = sympy.Integer(1), []
    while left:
        d = next((d for d in left if _number(value.stride(d)) == extent), None)
        if d is None:  # an expanded tensor has no order; nothing can view it that could not view `out`
            return out
        order.insert(0, d)
        left.remove(d)
        extent *= _number(value.shape[d])
    order = [d for d in range(value.dim()) if d not in order] + order
    if order == sorted(order):
        return out.contiguous()
    return out.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def _number(s: int | torch.SymInt) -> sympy.Expr:
    """A size or stride as an expression, to compare without a guard."""
    return s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s)


class _SizeValues:
    """Size expressions as numbers, or as values in the graph where they are dynamic."""

    def __init__(self, r: Reader, output: Node, proxy: Callable[[Node], Proxy]) -> None:
        self.r, self.output, self.proxy = r, output, proxy
        self._symbols: dict[str, Any] = {}

    def __call__(self, e: Expr) -> Any:
        c = x.constant(e)
        if c is not None:
            return c
        return TensorEvaluator((), (), _none, _none, self.symbol, torch.device("cpu")).scalar(e)

    def symbol(self, name: str) -> Any:
        """The value of a size symbol: a symbolic integer of the graph, or a dimension of one of its tensors."""
        if name not in self._symbols:
            self._symbols[name] = self._find(name)
        return self._symbols[name]

    def _find(self, name: str) -> Any:
        wanted, divisor = self.r.sizes.symbols[name]
        value = self._at_hand(wanted)
        if value is None:
            raise Refusal(ReasonKind.SHAPE, f"the dynamic size {wanted} is not at hand in the graph")
        return value if divisor == 1 else value // divisor

    def _at_hand(self, wanted: Any) -> Any:
        for n in self.output.graph.nodes:
            if n is self.output:
                break
            v = dg.value(n)
            if isinstance(v, torch.SymInt) and v.node.expr == wanted:
                return self.proxy(n)
            if isinstance(v, torch.Tensor) and n.op == "placeholder":
                for d, s in enumerate(v.shape):
                    if isinstance(s, torch.SymInt) and s.node.expr == wanted:
                        return self.proxy(n).size(d)
        return None


def _none(name: str) -> Any:
    raise KeyError(name)
