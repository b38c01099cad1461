"""Scores that are the largest logit of a block, of an indexer of its own: the rule of `fsa::select_blocks_by_max`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch.fx import Node

from .. import expr as x
from ..attention_form import Operand
from ..expr import Expr
from ..layout import find_layout
from ..nodes import argument, axis, dtype, op_name, rank
from ..operands import chain, Step
from ..reader import Coords, Mode
from .listed import kept
from .question import Cases, Question

NO_MAXIMUM = "the scores are not the largest logits of the blocks"


class ByMaximum:
    """The scores of a question as maxima of logits.

    Args:
        q: The question.

    Attributes:
        cases: When a block is forced, excluded or scored.

    Raises:
        Refusal: If the scores are something else.
    """

    def __init__(self, q: Question) -> None:
        self.q = q
        self.cases = Cases()
        maxima: set[Expr] = set()
        for given, leaf in q.scores:
            if leaf.op == "load":
                maxima.add(leaf)
                self.cases.scored.append(given)
            elif leaf.op == "const" and math.isinf(leaf.args[0]):
                (self.cases.forced if leaf.args[0] > 0 else self.cases.excluded).append(given)
            else:
                raise kept(NO_MAXIMUM)
        if len(maxima) != 1:
            raise kept(NO_MAXIMUM)
        self.q_at, self.k_at, self.position = self._logit(maxima.pop())

    def _logit(self, maximum: Expr) -> tuple[tuple[Node, Coords], tuple[Node, Coords], Expr]:
        """The query and key of the logits that are maximised over the tokens of a block, and the token's position."""
        q, r = self.q, self.q.r
        node = r.nodes[maximum.args[0]]
        dims = argument(node, 1, "dim") if op_name(node) == "amax" else None
        dims = [dims] if isinstance(dims, int) else dims
        if not dims or len(dims) != 1 or rank(node.args[0]) == 0:
            raise kept(NO_MAXIMUM)
        d, source, at = axis(dims[0], rank(node.args[0])), node.args[0], maximum.args[1]
        size = r.shape(source)[d]
        token = x.var("ranking.token", size)
        inside = (*at[:d], token, *at[d + bool(argument(node, 2, "keepdim", False)) :])
        if x.constant(size) != q.block_size:
            raise kept("the maxima run over something else than the tokens of a block")
        position = x.plus(x.times(q.block, q.block_size), token)
        seen, products = [], set()
        for given, leaf in x.cases(r.read(source, inside, Mode.FORMULA)):
            factor, product = leaf.args if leaf.op == "scaled" else (1.0, leaf)
            if product.op == "dot" and factor > 0:
                seen.append(given)
                products.add(product)
            elif leaf.op != "const" or leaf.args[0] != -math.inf:
                raise kept("logits of tokens that the query does not see are not -inf")
        if len(products) != 1:
            raise kept(NO_MAXIMUM)
        q.prove(
            "tokens", "the maxima are taken over other tokens than those up to the query",
            x.iff(x.disj(*seen), x.at_least(q.form.i, position)), x.TRUE,
        )  # fmt: skip
        (product,) = products
        operands = [(n, c) for n, c in r.operands.get(product, ()) if n is not None]
        keyed = [k for k, (_, c) in enumerate(operands) if any(x.as_var(token) in e.free for e in c)]
        summed = [v for v in product.args[0] if x.constant(v.args[1]) != 1]
        if len(operands) != 2 or len(keyed) != 1 or len(summed) != 1:
            raise kept(NO_MAXIMUM)
        self.d = x.poly(summed[0])
        return operands[1 - keyed[0]], operands[keyed[0]], token

    def operands(self, replaceable: frozenset[Node]) -> tuple[Operand, Operand, int]:
        """The queries and keys of the indexer, and how many heads the keys have.

        Args:
            replaceable: Shadow nodes that stand for a node of the Dynamo graph.

        Raises:
            Refusal: If there is no view of them as ``(b, h, n, d)``, each a positive multiple.
        """
        form, heads = self.q.form, self.q.form.kv_heads
        bs, _, ns, *_ = form.sizes
        width = x.as_var(self.d).args[1]  # type: ignore[union-attr]
        key = x.var("ranking.position", form.keys)
        by_position = {
            x.as_var(self.q.block): x.floordiv(key, self.q.block_size), x.as_var(self.position): x.mod(key, self.q.block_size),
        }  # fmt: skip
        for k in self._steps(self.k_at, replaceable):
            coords = tuple(x.substitute(c, by_position) for c in k.coords)
            for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
                targets = (form.b, x.floordiv(self.q.head, heads // kv_heads), key, self.d)
                sizes = (bs, x.integer(kv_heads), form.keys, width)
                k_layout = find_layout(coords, self.q.r.shape(k.node), targets, sizes)
                if k_layout is None:
                    continue
                for n in self._steps(self.q_at, replaceable):
                    targets = (form.b, self.q.head, form.i, self.d)
                    layout = find_layout(n.coords, self.q.r.shape(n.node), targets, (bs, x.integer(heads), ns, width))
                    if layout is not None and n.factor * k.factor > 0:
                        found = (n, layout), (k, k_layout)
                        return *(Operand(s.node.name, held, dtype(s.node)) for s, held in found), kv_heads
        raise kept("queries or keys of the scores have no view as (batch, heads, tokens, head dim)")

    def _steps(self, operand: tuple[Node, Coords], replaceable: frozenset[Node]) -> Iterator[Step]:
        """Where an operand can be taken, the deepest first."""
        return (s for s in reversed(chain(self.q.r, *operand)) if s.node in replaceable and s.guard is x.TRUE)
