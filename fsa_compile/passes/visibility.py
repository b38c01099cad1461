"""The obligations of a candidate: its visibility is the site's, key for key, and empty rows have a value.

Three shapes of key map, all without quantifiers:

* *dense* (``key(j) == j``): ``visible(j) <=> rule(j)``.
* *gathered* (``key(j) == B * list[s] + r`` with ``j = B*s + r``): no visible key twice; visible implies in range and the
  rule; a valid entry and the rule imply visible. The explicit slot is the witness, so nothing is quantified.
* *shifted* (``key(j) == A(row) + j`` or ``A(row) - j``: look-back chunks, unfold, a gather of the last keys): visible implies
  real and the rule; the rule implies that the index of p exists and is visible. A shift is injective, so no key comes twice.
"""

from __future__ import annotations

from ..registry.pattern import Candidate
from ..report import Proof, ReasonKind
from . import expr as x
from .expr import Expr
from .form_view import FormView
from .prove import Prover, Refused, counterexample_of
from .refusal import Refusal


def prove_candidate(view: FormView, candidate: Candidate, prover: Prover) -> tuple[Proof, ...]:
    """All obligations of `candidate` except those about empty rows.

    Raises:
        Refusal: With a counterexample where the solver found one.
    """
    try:
        if view.dense:
            return _dense(view, candidate, prover)
        if candidate.blocks is not None:
            return _gathered(view, candidate, prover)
        return _shifted(view, candidate, prover)
    except Refused as refusal:
        refusal.counterexample = counterexample_of(view, refusal.model, str(candidate), refusal.beyond)
        raise


def _dense(view: FormView, candidate: Candidate, prover: Prover) -> tuple[Proof, ...]:
    form = view.form
    rule = candidate.visible(form.j)
    proof = prover.require(
        ReasonKind.MASK, f"the mask is not {candidate}", f"visible == {candidate.role}",
        x.iff(form.visible, rule), terms=candidate.terms, facts=candidate.facts,
    )  # fmt: skip
    real = prover.require(
        ReasonKind.OPERANDS, "a visible key is padding", "visible keys are real", x.conj(form.guard, x.less(form.j, form.keys)),
        given=form.visible, terms=candidate.terms, facts=candidate.facts,
    )  # fmt: skip
    if form.keys is form.width:
        return proof, real
    # K is longer than what the softmax sees of it (a slice above the cut): the op must not see the rest.
    p = x.var("p", form.keys)
    rest = prover.require(
        ReasonKind.OPERANDS, "the op would see keys that the model cut off", "no key beyond the softmax",
        x.negate(candidate.visible(p)), given=x.at_least(p, form.width), terms=candidate.terms, facts=candidate.facts, beyond=p,
    )  # fmt: skip
    return proof, real, rest


def _shifted(view: FormView, candidate: Candidate, prover: Prover) -> tuple[Proof, ...]:
    form = view.form
    jv = x.as_var(form.j)
    assert jv is not None
    affine = affine_key(view)
    if affine is None:
        raise Refusal(ReasonKind.OPERANDS, f"keys are taken in an order that no op knows: {x.show(form.key)[:120]}")
    key, base, sign = affine
    placed = prover.require(
        ReasonKind.OPERANDS, "a visible key is clamped to another place", "visible keys stand where the index says",
        x.equal(form.key, key), given=form.visible, terms=candidate.terms, facts=candidate.facts,
    )  # fmt: skip
    p = x.var("p", form.keys)
    sound = prover.require(
        ReasonKind.MASK, f"the mask is not {candidate}", "visible keys are real and in the rule",
        x.conj(candidate.visible(key), x.in_range(key, form.keys), form.guard), given=form.visible,
        terms=candidate.terms, facts=candidate.facts,
    )  # fmt: skip
    index = x.times(x.minus(p, base), sign)
    complete = prover.require(
        ReasonKind.MASK, f"the mask is not {candidate}", "keys in the rule are visible, once",
        x.conj(x.in_range(index, form.width), x.substitute(form.visible, {jv: index})), given=candidate.visible(p),
        terms=candidate.terms, facts=candidate.facts, beyond=p,
    )  # fmt: skip
    return placed, sound, complete


def affine_key(view: FormView) -> tuple[Expr, Expr, int] | None:
    """The key position as ``base(row) + sign * j`` with sign 1 or -1, perhaps clamped into range where it is masked.

    Returns:
        (position, base, sign), or None if it is not of that form. That visible keys stand there is still to be proven.
    """
    form = view.form
    jv = x.as_var(form.j)
    for key in (form.key, *x.branches(form.key)):
        for sign in (1, -1):
            base = x.minus(key, x.times(form.j, sign))
            if jv not in base.free:
                return key, base, sign
    return None


def slot_and_offset(view: FormView, block_size: int, tag: str = "") -> tuple[Expr, Expr, dict[Expr, Expr]]:
    """``j = block_size * slot + offset`` with fresh variables, and the substitution."""
    form = view.form
    jv = x.as_var(form.j)
    assert jv is not None
    slots = x.floordiv(form.width, block_size)
    slot = x.var(f"slot{tag}", slots) if slots is not x.ONE else x.ZERO
    offset = x.var(f"offset{tag}", block_size) if block_size > 1 else x.ZERO
    return slot, offset, {jv: x.plus(x.times(slot, block_size), offset)}


def _gathered(view: FormView, candidate: Candidate, prover: Prover) -> tuple[Proof, ...]:
    form, blocks = view.form, candidate.blocks
    assert blocks is not None
    extra: dict[str, tuple[Expr, ...]] = dict(terms=candidate.terms, facts=candidate.facts)
    s1, r1, m1 = slot_and_offset(view, blocks.block_size)
    s2, r2, m2 = slot_and_offset(view, blocks.block_size, "2")
    seen1, seen2 = (x.substitute(form.visible, m) for m in (m1, m2))
    key1, key2 = (x.substitute(form.key, m) for m in (m1, m2))
    once = prover.require(
        ReasonKind.DUPLICATES, "a visible key may be gathered twice; the op would count it once", "each key once",
        x.conj(x.equal(s1, s2), x.equal(r1, r2)), given=x.conj(seen1, seen2, x.equal(key1, key2)), **extra,
    )  # fmt: skip
    real = prover.require(
        ReasonKind.OPERANDS, "a visible key lies outside the keys", "visible keys are real",
        x.conj(x.in_range(key1, form.keys), x.substitute(form.guard, m1)), given=seen1, **extra,
    )  # fmt: skip
    (segment,) = blocks.segments
    here = {x.as_var(segment.slot): s1} if x.as_var(segment.slot) is not None else {}
    entry, valid = (x.substitute(e, here) for e in (segment.entry, segment.valid))  # type: ignore[arg-type]
    position = x.plus(x.times(entry, blocks.block_size), r1)
    placed = prover.require(
        ReasonKind.OPERANDS, "a visible key does not stand where the list says", "visible keys stand where the list says",
        x.equal(key1, position), given=seen1, **extra,
    )  # fmt: skip
    sound = prover.require(
        ReasonKind.MASK, f"the mask is not {candidate}", "visible keys are listed and in the rule",
        x.conj(valid, blocks.order(key1)), given=seen1, **extra,
    )  # fmt: skip
    complete = prover.require(
        ReasonKind.MASK, f"the mask is not {candidate}", "listed keys in the rule are visible",
        seen1, given=x.conj(valid, x.in_range(position, form.keys), blocks.order(position)), **extra,
    )  # fmt: skip
    return once, real, placed, sound, complete


def prove_no_empty_row(view: FormView, candidate: Candidate, prover: Prover) -> Proof | None:
    """A proof that every query sees a key: one of the candidate's witnesses is visible. None if there is none."""
    form = view.form
    jv = x.as_var(form.j)
    assert jv is not None
    some = x.disj(*(x.conj(x.in_range(w, form.width), x.substitute(form.visible, {jv: w})) for w in candidate.witnesses))
    answer = prover.prove("every query sees a key", some, terms=candidate.terms, facts=candidate.facts)
    return answer if isinstance(answer, Proof) else None
