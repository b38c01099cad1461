"""The normal form of attention, as data.

::

    logit(b, h, i, j) = scale * temperatures(b, h, i)
                        * sum_d Q[b, h, i, d] * K[b, h // G, key(b, h, i, j), d]         if visible(b, h, i, j)
                      = a fill                                                         otherwise
    out(b, h, i, :)   = sum_j softmax_j(logit) * V[b, h // G, key(b, h, i, j), :]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import expr as x
from .expr import Expr
from .layout import Layout


@dataclass(frozen=True)
class Operand:
    """Q, K or V: a node, how it holds the canonical tensor, and the dtype in which it is used.

    Attributes:
        node: Name of the shadow node.
        layout: Its dimensions as ``(b, h, n, d)``.
        dtype: The dtype at the contraction, where autocast or the model has cast it.
    """

    node: str
    layout: Layout
    dtype: torch.dtype


@dataclass(frozen=True)
class Temperature:
    """A run-time factor of all logits of a row, which the rewrite puts onto the query.

    Attributes:
        node: Name of the shadow node that holds it.
        coords: Where, in terms of the form's b, h and i.
        inverse: Whether the logits are divided by it.
    """

    node: str
    coords: tuple[Expr, ...]
    inverse: bool


@dataclass(frozen=True)
class AttentionForm:
    """The normal form of one attention site.

    Attributes:
        softmax: Name of the shadow node that normalises.
        output: Name of the shadow node that the op's result replaces.
        output_layout: Its dimensions as ``(b, hq, n, dv)``.
        b, h, i, j: The coordinates: batch, query head, query, and index of the key as the spelling counts it.
        sizes: ``(b, hq, n, dk, dv)``.
        width: How many key indices the softmax runs over.
        visible: When the logit is ``scale * <q, k>``; otherwise it is one of `fills`.
        fills: The constants that masked logits get.
        additive: Whether a fill is added to the product (its gradient then flows) instead of replacing it.
        in_sums: Whether every masked logit is that product and a fill added to it.
        scale: The constant that multiplies the product.
        temperatures: The run-time factors that multiply or divide it.
        key: The position in K and V of key index j.
        guard: When that position is real and not padding.
        keys: The length of K and V.
        kv_heads: The number of heads of K and V.
        q, k, v: The operands.
        probability: The element of the softmax's result that belongs to (b, h, i, j).
        zero_rows: Whether a row that sees nothing gives zeros (SDPA, nan_to_num, a second mask behind the softmax or the output,
            a divisor that is kept from zero).
        settled: Whether it is known what such a row gives; it is not where a softmax by hand subtracts any run-time value.
    """

    softmax: str
    output: str
    output_layout: Layout
    b: Expr
    h: Expr
    i: Expr
    j: Expr
    sizes: tuple[Expr, ...]
    width: Expr
    visible: Expr
    fills: frozenset[float]
    additive: bool
    in_sums: bool
    scale: float
    temperatures: tuple[Temperature, ...]
    key: Expr
    guard: Expr
    keys: Expr
    kv_heads: int
    q: Operand
    k: Operand
    v: Operand
    probability: tuple[Expr, ...]
    zero_rows: bool
    settled: bool

    @property
    def groups(self) -> int:
        """G: query heads per key/value head."""
        hq = x.constant(self.sizes[1])
        assert hq is not None
        return hq // self.kv_heads
