"""Why a mask that run-time values decide is not rewritten, in the user's terms: padding, packed documents, a mask as input."""

from __future__ import annotations

from collections.abc import Iterator

from ..report import ReasonKind
from . import expr as x
from .expr import Expr
from .form_view import FormView
from .refusal import Refusal

_OPAQUE = ("apply", "predicate", "compare", "load")


def unrecognised(view: FormView) -> Refusal | None:
    """The refusal of a mask one of whose conditions is no list of blocks; None if no condition stands out.

    Args:
        view: A form that no pattern could be proven for.
    """
    form = view.form
    b, i, j = (x.as_var(e) for e in (form.b, form.i, form.j))
    h = x.as_var(form.h)
    for condition in _conditions(form.visible):
        leaves = [t for t in x.walk(condition) if t.op in _OPAQUE and t.op != "compare"]
        if not leaves or any(t.op == "exists" for t in x.walk(condition)):
            continue
        name, source = _where(view, leaves)
        if i not in condition.free and h not in condition.free and j in condition.free:
            text = f"a padding mask: {name} decides at run time which keys count, and the op has no mask of keys"
        elif i in condition.free and j in condition.free and _compares(condition, i, j):
            text = f"packed documents: {name} decides at run time where they end, and the op has no boundaries between documents"
        elif {i, j} & condition.free:
            text = f"the mask holds run-time values that are no list of blocks ({name})"
        elif b in condition.free or not condition.free:
            text = f"a condition on whole sequences ({name}) masks keys at run time"
        else:
            continue
        return Refusal(ReasonKind.RUNTIME_MASK, text, source=source)
    return None


def _conditions(visible: Expr) -> Iterator[Expr]:
    """The conditions that all have to hold; those inside of alternatives if there is only one way to see a key."""
    yield from visible.args if visible.op == "and" else (visible,)


def _where(view: FormView, leaves: list[Expr]) -> tuple[str, str | None]:
    """What the user calls the tensor that decides, and the line where it is used. A buffer has a value of its own."""
    r = view.reader
    named = sorted({str(t.args[0]) for t in leaves})
    held = next((n for n in named if n in r.buffers), None)
    if held is not None:
        return f"{r.buffers[held].label}, whose value is no rule that is known,", r.place(held)[1]
    return r.place(named[0])


def _compares(condition: Expr, i: Expr | None, j: Expr | None) -> bool:
    """Whether one tensor is read at the query and at the key, and the two are compared."""
    at: dict[str, set[bool]] = {}
    for t in x.walk(condition):
        if t.op in ("apply", "predicate", "load"):
            free = t.free
            if (i in free) != (j in free):
                at.setdefault(str(t.args[0]), set()).add(i in free)
    return any(len(sides) == 2 for sides in at.values())
