"""An attention form as patterns see it: its coordinates, and its visibility at single points."""

from __future__ import annotations

from dataclasses import dataclass

from . import expr as x
from .attention_form import AttentionForm
from .evaluate import at_point
from .expr import Expr
from .reader import Reader


@dataclass(frozen=True)
class FormView:
    """Wraps a form with what is needed to look at it.

    Attributes:
        form: The normal form.
        reader: The reader it came from.
    """

    form: AttentionForm
    reader: Reader

    @property
    def query(self) -> Expr:
        """The query position i."""
        return self.form.i

    @property
    def dense(self) -> bool:
        """Whether the spelling counts keys by their position (a mask, not a gather)."""
        return self.form.key is self.form.j

    @property
    def queries(self) -> int:
        """n, as it was when the graph was traced."""
        return self.reader.sizes.hint(self.form.sizes[2])

    @property
    def keys(self) -> int:
        """m, as it was when the graph was traced."""
        return self.reader.sizes.hint(self.form.keys)

    @property
    def width(self) -> int:
        """How many key indices the softmax runs over, as it was when the graph was traced."""
        return self.reader.sizes.hint(self.form.width)

    def causal(self, p: Expr, first: Expr = x.ZERO) -> Expr:
        """The formula "key position p is not after the query", for a query 0 that stands at position `first`."""
        return x.at_least(x.plus(self.form.i, first), p)

    def first_positions(self) -> list[tuple[Expr, int | None]]:
        """Where query 0 may stand among the keys: the position, and what an op takes for it (None: its default, m - n).

        A chunk of queries, or the last ones, is compared with the keys as ``j <= i + first``: every such comparison in the mask
        names a candidate. Position 0 is always one, and the last.
        """
        found: list[tuple[Expr, int | None]] = []
        spare = self.keys - self.queries
        i = x.as_var(self.form.i)
        for t in x.walk(self.form.visible) if spare > 0 else ():
            if t.op != "ge" or i is not None and dict(t.args[0].args[1]).get(i) != 1:
                continue
            constant, terms = t.args[0].args
            first = x.integer(constant)
            for atom, k in terms:
                if atom.op == "size":
                    first = x.plus(first, x.times(x.poly(atom), k))
            number = x.constant(first)
            if number is not None and 0 < number <= spare and (first, number) not in found:
                found.append((first, number))
            elif number is None and first is x.minus(self.form.keys, self.form.sizes[2]) and (first, None) not in found:
                found.append((first, None))
        return [*found, (x.ZERO, 0)]

    def data_dependent(self) -> bool:
        """Whether visibility or key positions depend on run-time values."""
        opaque = ("apply", "predicate", "compare", "exists")
        return any(t.op in opaque for e in (self.form.visible, self.form.key) for t in x.walk(e))

    def sees(self, query: int, key_index: int) -> bool:
        """Whether a query sees a key index, in the first batch row and head.

        Raises:
            DataDependent: If run-time values decide.
        """
        form = self.form
        values = dict.fromkeys(form.visible.free, 0)
        for e, v in ((form.i, query), (form.j, key_index)):
            atom = x.as_var(e)
            if atom is not None:
                values[atom] = v
        return bool(at_point(form.visible, values, self.reader.sizes.hints))
