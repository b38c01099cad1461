"""Why a mask that run-time values decide is not rewritten, in the user's terms: padding, packed documents, a mask as input."""

from __future__ import annotations

from ..report import ReasonKind
from . import expr as x
from .expr import Expr
from .form_view import FormView
from .refusal import Refusal

_LEAVES = ("apply", "predicate", "load")


def needed(view: FormView, e: Expr) -> Refusal:
    """The refusal of a mask whose parameters cannot be fitted, because `e` is only known at run time."""
    leaves = [t for t in x.walk(e) if t.op in _LEAVES]
    name, source = _where(view, leaves) if leaves else (e.op, None)
    return Refusal(ReasonKind.RUNTIME_MASK, f"the mask holds run-time values ({name})", source=source)


def unrecognised(view: FormView) -> Refusal:
    """The refusal of a mask that depends on data and of which no pattern proposed anything."""
    leaves = [t for t in x.walk(view.form.visible) if t.op in ("predicate", "compare")]
    if not leaves:
        return Refusal(ReasonKind.MASK, "the mask depends on data in a way that is no single list of blocks per query")
    name, source = _where(view, [t for leaf in leaves for t in x.walk(leaf) if t.op in _LEAVES])
    return Refusal(ReasonKind.RUNTIME_MASK, f"the mask holds run-time values that are no list of blocks ({name})", source=source)


def outsider(view: FormView) -> Refusal | None:
    """The refusal of a mask one of whose conditions is no list of blocks; None if no condition stands out.

    Args:
        view: A form that no pattern could be proven for.
    """
    form = view.form
    if not view.dense:  # gathered keys: every condition holds the list
        return None
    h, i, j = (x.as_var(e) for e in (form.h, form.i, form.j))
    for condition in form.visible.args if form.visible.op == "and" else (form.visible,):
        leaves = [t for t in x.walk(condition) if t.op in _LEAVES]
        if not leaves or any(t.op == "exists" for t in x.walk(condition)):
            continue
        name, source = _where(view, leaves)
        if i not in condition.free and h not in condition.free and j in condition.free:
            text = f"a padding mask: {name} decides at run time which keys count, and the op has no mask of keys"
        elif i in condition.free and j in condition.free and _compares(condition, i, j):
            text = f"packed documents: {name} decides at run time where they end, and the op has no boundaries between documents"
        elif {i, j} <= condition.free and condition.op in ("predicate", "not"):
            text = f"the mask holds run-time values that are no list of blocks ({name})"
        elif not {i, j, h} & condition.free:
            text = f"a condition on whole sequences ({name}) masks keys at run time"
        else:
            continue
        return Refusal(ReasonKind.RUNTIME_MASK, text, source=source)
    return None


def _where(view: FormView, leaves: list[Expr]) -> tuple[str, str | None]:
    """What the user calls the tensor that decides, and the line where it is used. A buffer has a value of its own."""
    r = view.reader
    named = sorted({str(t.args[0]) for t in leaves}) or ["?"]
    held = next((n for n in named if n in r.buffers), None)
    if held is not None:
        return f"the irregular buffer {r.buffers[held].label}", r.place(held)[1]
    return r.place(named[0])


def _compares(condition: Expr, i: Expr | None, j: Expr | None) -> bool:
    """Whether one tensor is read at the query and at the key, and the two are compared."""
    at: dict[str, set[bool]] = {}
    for t in x.walk(condition):
        if t.op in _LEAVES:
            free = t.free
            if (i in free) != (j in free):
                at.setdefault(str(t.args[0]), set()).add(i in free)
    return any(len(sides) == 2 for sides in at.values())
