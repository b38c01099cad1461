"""The expression language that lifting speaks: what an element of a tensor is, as a function of its coordinates.

Three sorts:

* ``INT``: polynomials over *atoms* (variables, size symbols, quotients, remainders, uninterpreted applications,
  conditionals). Kept in a normal form in which a reshape and its inverse cancel.
* ``BOOL``: formulas over comparisons of integers, comparisons of reals, opaque predicates and ``exists``.
* ``REAL``: a case tree over formulas, with leaves constant, load, dot product, softmax, scaled, sum.

Expressions are hash-consed: two expressions are equal in normal form iff they are the same object, so head maps and key
maps are compared with ``is``. Tensors are referred to by the *name* of their graph node; nothing here holds a graph.

Sizes are integer expressions too: a constant, or a polynomial over size symbols when the sequence length is dynamic.
"""

from __future__ import annotations

from .formula import (
    FALSE,
    TRUE,
    at_least,
    boolean,
    clamp,
    conj,
    disj,
    equal,
    exists,
    iff,
    implies,
    in_range,
    less,
    negate,
    predicate,
    select,
)  # fmt: skip
from .integer import (
    ONE,
    ZERO,
    apply,
    as_atom,
    as_var,
    branches,
    constant,
    floordiv,
    integer,
    minus,
    mod,
    plus,
    poly,
    size_symbol,
    times,
    upper,
    var,
    within,
)  # fmt: skip
from .node import BOOL, INF, INT, REAL, Expr, TimeSpent, children, time_limit, walk
from .real import (
    add_reals,
    add_to_infinity,
    cases,
    compare_ints,
    compare_reals,
    constant_real,
    dot,
    from_int,
    is_infinite,
    load,
    map_cases,
    map_truth,
    opaque,
    real,
    scaled,
    softmax,
    truth,
    zero_times,
)  # fmt: skip
from .show import show
from .substitution import rebuild, substitute

__all__ = [
    "BOOL",
    "Expr",
    "FALSE",
    "INF",
    "INT",
    "ONE",
    "REAL",
    "TRUE",
    "ZERO",
    "add_reals",
    "add_to_infinity",
    "apply",
    "as_atom",
    "as_var",
    "at_least",
    "boolean",
    "branches",
    "cases",
    "children",
    "clamp",
    "compare_ints",
    "compare_reals",
    "conj",
    "constant",
    "constant_real",
    "disj",
    "dot",
    "equal",
    "exists",
    "floordiv",
    "from_int",
    "iff",
    "implies",
    "in_range",
    "integer",
    "is_infinite",
    "less",
    "load",
    "map_cases",
    "map_truth",
    "minus",
    "mod",
    "negate",
    "opaque",
    "plus",
    "poly",
    "predicate",
    "real",
    "rebuild",
    "scaled",
    "select",
    "show",
    "size_symbol",
    "softmax",
    "substitute",
    "times",
    "truth",
    "upper",
    "var",
    "walk",
    "within",
    "zero_times",
]
