"""The list of a selected branch as the result of one top-k, and single blocks beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...registry.pattern import BlockList, Segment
from ...report import ReasonKind
from .. import expr as x
from ..attention_form import AttentionForm
from ..expr import Expr
from ..nodes import argument, op_name
from ..reader import Coords, Reader
from ..refusal import Refusal


@dataclass(frozen=True)
class Listed:
    """A list of blocks.

    Attributes:
        top: Name of the top-k.
        at: Where a pick stands in its indices, in terms of the selected form's b and i and of `head`.
        axis: The axis of the picks.
        counts: When the pick there is in the list.
        singles: What else is in it.
    """

    top: str
    at: Coords
    axis: int
    counts: Expr
    singles: tuple[Segment, ...]

    @property
    def pick(self) -> Expr:
        """The variable that counts the picks."""
        v = x.as_var(self.at[self.axis])
        assert v is not None
        return v

    def element(self, block: Expr) -> Coords:
        """Where the score of a block stands."""
        return (*self.at[: self.axis], block, *self.at[self.axis + 1 :])


def kept(text: str) -> Refusal:
    """The model's own list is used: why."""
    return Refusal(ReasonKind.SCORES, text)


def take_apart(r: Reader, form: AttentionForm, blocks: BlockList, head: Expr) -> Listed:
    """The top-k of a list and the single blocks beside the picks.

    Args:
        r: Reader of the shadow graph.
        form: The selected branch.
        blocks: Its list.
        head: Counts the key/value heads.

    Raises:
        Refusal: If the list is made of something else.
    """
    h = x.as_var(form.h)
    mapping = {**blocks.index, **({h: x.times(head, form.groups)} if h is not None else {})}
    found: list[tuple[str, Coords, int, Expr]] = []
    singles: list[Segment] = []
    for s in blocks.segments:
        entry, valid = (x.substitute(e, mapping) for e in (s.entry, s.valid))
        for given, leaf in _int_cases(entry):
            number, slot = x.constant(leaf), x.as_var(s.slot)
            if number is not None and (number < 0 or number >= r.sizes.hint(form.keys)):
                continue  # no block
            picks = _picks(r, leaf, slot, x.conj(given, valid)) if slot is not None else None
            if picks is not None:
                found.append(picks)
            elif slot not in leaf.free:
                singles.append(Segment(leaf, _somewhere(x.conj(given, valid), slot), x.ZERO))
            else:
                raise kept("the list holds more than the result of one top-k and single blocks")
    if len(found) != 1:
        raise kept(f"the list is made of {len(found)} results of a top-k")
    return Listed(*found[0], tuple(singles))


def _picks(r: Reader, leaf: Expr, slot: Expr, counts: Expr) -> tuple[str, Coords, int, Expr] | None:
    """An element of a top-k, moved so that the slot counts its picks, and when it counts; None if it is something else."""
    atom = x.as_atom(leaf)
    if atom is None or atom.op != "apply" or atom.args[0] not in r.tops:
        return None
    node, axis = r.tops[atom.args[0]]
    if op_name(node) != "topk" or not argument(node, 3, "largest", True):
        return None
    number = r.sizes.shape(node.meta["val"][1])[axis]
    width = x.constant(number)
    if width is None:  # the smallest of a number and all blocks there are, as a rule
        r.sizes.want_number(number)
    ahead = x.constant(x.minus(atom.args[1][axis], x.poly(slot)))
    slots = x.constant(slot.args[1])
    if width is None or ahead is None or slots is None:
        return None
    if not 0 <= -ahead <= slots - width:
        raise kept("a part of the picks is in the list")
    moved = {slot: x.minus(x.var("ranking.pick", width), ahead)}
    return atom.args[0], tuple(x.substitute(c, moved) for c in atom.args[1]), axis, x.substitute(counts, moved)


def _somewhere(counts: Expr, slot: Expr | None) -> Expr:
    """When a block that does not depend on the slot is certainly in the list."""
    if slot is None or slot not in counts.free:
        return counts
    ends = (x.ZERO, x.minus(slot.args[1], 1))
    return x.disj(*(x.substitute(counts, {slot: end}) for end in ends))


def _int_cases(e: Expr, given: Expr = x.TRUE) -> Iterator[tuple[Expr, Expr]]:
    """The leaves of an integer case tree, each with its condition."""
    a = x.as_atom(e)
    if a is not None and a.op == "if_int":
        yield from _int_cases(a.args[1], x.conj(given, a.args[0]))
        yield from _int_cases(a.args[2], x.conj(given, x.negate(a.args[0])))
    else:
        yield given, e
