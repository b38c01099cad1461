"""From a site to a proven match: every form the lifting offers, against every pattern, until one is proven."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..registry.pattern import Candidate, Pattern
from ..report import Proof, ReasonKind
from . import expr as x
from . import runtime_mask
from .attention_form import AttentionForm
from .evaluate import DataDependent
from .form_view import FormView
from .lift import lift
from .nodes import op_name
from .normal_form import SAFE
from .prove import Prover
from .reader import Reader, SOFTMAXES
from .refusal import Refusal
from .sites import SiteNodes, dropout_between
from .visibility import prove_no_empty_row


@dataclass(frozen=True)
class Match:
    """A proven site.

    Attributes:
        pattern: The role.
        candidate: With its parameters.
        form: What was matched.
        reader: Where the nodes are that it names.
        proofs: The discharged obligations.
        empty_value: What a row that sees no key gives in the user's code: None if there is no such row, else
            ``"zero"``, ``"nan"``, ``"mean"`` (a finite fill gives the mean over all keys), ``"even"`` (the same from logits
            that a fill was added to: gradients flow to q and k as from a softmax of equal logits), ``"poison"`` (NaN from logits
            that -inf was added to: the gradients of q and k are NaN too) or ``"poisoned zero"`` (set to zero behind the softmax:
            these gradients alone are NaN).
    """

    pattern: Pattern
    candidate: Candidate
    form: AttentionForm
    reader: Reader
    proofs: tuple[Proof, ...]
    empty_value: str | None


def classify(
    r: Reader, site: SiteNodes, replaceable: frozenset[Node], patterns: Sequence[Pattern], prover: Prover, needs_grad: bool
) -> Match:
    """The first pattern that is proven. Attention to all keys counts only if no other form is better: copies that were gathered for
    each query are all seen, and are a list of blocks where the keys are taken from further up.

    Args:
        r: Reader of the shadow graph.
        site: The softmax and its contraction.
        replaceable: Shadow nodes that stand for a Dynamo node.
        patterns: In the order to try.
        prover: Proves, within the graph's budget.
        needs_grad: Whether gradients flow through the site.

    Raises:
        Refusal: The most telling reason if none is proven.
        TimeSpent: If the time limit ends before there is any reason.
    """
    p = dropout_between(site.softmax)
    if p:
        raise Refusal(ReasonKind.DROPOUT, f"dropout with p = {p:g} on the probabilities")
    refusals: list[Refusal] = []
    first: FormView | None = None
    left: list[Match] = []
    asked: set[tuple[object, ...]] = set()
    try:
        for form in lift(r, site.softmax, site.contraction, replaceable):
            question = _question(form)
            if question in asked:
                continue
            asked.add(question)
            view = FormView(form, r)
            first = first or view
            match = _first_proven(view, patterns, prover, needs_grad, refusals, left)
            if match is not None:
                return match
            if prover.spent > prover.seconds or any(r_.reason.kind in FINAL for r_ in refusals):
                break
    except x.TimeSpent:
        if not refusals and not left:
            raise
    if left:
        return left[0]
    best = max(refusals, key=_telling, default=None)
    if first is not None and first.data_dependent() and (best is None or best.reason.kind in MASKS):
        raise runtime_mask.outsider(first) or best or runtime_mask.unrecognised(first)
    raise best or Refusal(ReasonKind.MASK, "no registered pattern has this visibility")


def _question(form: AttentionForm) -> tuple[object, ...]:
    """What is asked of the patterns: a form that differs in the depth of its operands alone has the same answer."""
    depths = ("output", "output_layout", "q", "k", "v")
    return tuple(getattr(form, f.name) for f in dataclasses.fields(form) if f.name not in depths)


def _first_proven(
    view: FormView, patterns: Sequence[Pattern], prover: Prover, needs_grad: bool, refusals: list[Refusal], left: list[Match]
) -> Match | None:
    """The first pattern that is proven for one form.

    Args:
        view: The form.
        patterns, prover, needs_grad: As in `classify`.
        refusals: Learns why other patterns are not.
        left: Learns what is full attention in this form, and may be something else in another.
    """
    for pattern in patterns:
        try:
            for candidate in pattern.match(view):
                try:
                    proofs = pattern.check(view, candidate, prover)
                    more, empty = _empty_rows(view, candidate, prover, needs_grad)
                    match = Match(pattern, candidate, view.form, view.reader, proofs + more, empty)
                    if pattern.rewrites or view.form.visible is not x.TRUE:
                        return match
                    left.append(match)
                except Refusal as refusal:
                    _want_lengths(view, candidate)
                    refusal.fitted = bool(candidate.parameters)
                    refusals.append(refusal)
        except Refusal as refusal:  # a pattern that knows better while proposing
            refusals.append(refusal)
        except DataDependent as unknown:
            refusals.append(runtime_mask.needed(view, unknown.expression))
    return None


def _want_lengths(view: FormView, candidate: Candidate) -> None:
    """Lengths that no guard relates, although the mask does: as many keys as queries, and as many blocks to choose from as keys have.
    """
    form, r = view.form, view.reader
    r.sizes.want_equal(form.keys, form.sizes[2])
    if candidate.blocks is None:
        return
    size = candidate.blocks.block_size
    picks = {t.args[0] for s in candidate.blocks.segments for t in x.walk(s.entry) if t.op == "apply" and t.args[0] in r.tops}
    of_keys = x.floordiv(x.plus(form.keys, size - 1), size)
    for node, axis in (r.tops[name] for name in sorted(picks)):
        ranked = r.shape(node.args[0])[axis]
        r.sizes.want_equal(ranked, of_keys)
        if x.constant(ranked) == r.sizes.hint(of_keys):
            r.sizes.want_number(of_keys)


MASKS = (ReasonKind.MASK, ReasonKind.RUNTIME_MASK)
FINAL = (ReasonKind.EMPTY_ROWS, ReasonKind.GRADIENT)
"""Found after everything else was proven: another view of the same site would fail in the same way."""

_RANK = {
    ReasonKind.EMPTY_ROWS: 5,
    ReasonKind.GRADIENT: 5,
    ReasonKind.DUPLICATES: 4,
    ReasonKind.TOKEN_LEVEL: 4,
    ReasonKind.OPERANDS: 3,
    ReasonKind.MASK: 2,
    ReasonKind.RUNTIME_MASK: 2,
}


def _telling(refusal: Refusal) -> tuple[int, bool, bool]:
    """How near the attempt came: a failed proof about empty rows means that everything before it held, and a rule whose
    parameters were fitted to the mask is nearer than one without."""
    return _RANK.get(refusal.reason.kind, 1), refusal.counterexample is not None, refusal.fitted


def _empty_rows(
    view: FormView, candidate: Candidate, prover: Prover, needs_grad: bool
) -> tuple[tuple[Proof, ...], str | None]:
    """What rows without a visible key give, and whether the op's log-sum-exp can repair them."""
    form = view.form
    if not form.fills:
        return (), None
    proof = prove_no_empty_row(view, candidate, prover)
    if proof is not None:
        return (proof,), None
    if not form.settled:
        text = "a query may see no key, and what its weights are then depends on what is subtracted from the logits"
        raise Refusal(ReasonKind.EMPTY_ROWS, text)
    added_gradient = form.additive and needs_grad
    whole_rows = view.dense and form.keys is form.width
    minus_infinity = -math.inf in form.fills
    if form.zero_rows or form.fills == {-math.inf}:
        safe = op_name(view.reader.nodes[form.softmax]) in SAFE
        if added_gradient and minus_infinity and not safe:  # 0 * NaN reaches q and k through the sum
            everywhere = whole_rows and form.in_sums and op_name(view.reader.nodes[form.softmax]) in SOFTMAXES
            if form.fills == {-math.inf} and everywhere:
                return (), "poisoned zero" if form.zero_rows else "poison"
            raise Refusal(
                ReasonKind.GRADIENT,
                "a query may see no key, and an added -inf then gives NaN gradients that the op would drop",
            )
        if not form.zero_rows and needs_grad and not whole_rows:
            raise Refusal(
                ReasonKind.GRADIENT,
                "a query may see no key, and its NaN gradients then reach only the keys that it gathered",
            )
        return (), "zero" if form.zero_rows else "nan"
    if len(form.fills) > 1:
        raise Refusal(ReasonKind.EMPTY_ROWS, "a query may see no key, and its masked logits get different finite values")
    if op_name(view.reader.nodes[form.softmax]) == "exp":  # y - logsumexp(y) loses the logarithm of the sum beside a huge fill
        raise Refusal(ReasonKind.EMPTY_ROWS, "a query may see no key, and the probabilities of its row are then rounded to one")
    if not whole_rows:
        raise Refusal(
            ReasonKind.EMPTY_ROWS,
            "a query may see no key, and a finite fill then averages over gathered or padded keys",
        )
    if form.additive and not _forgets_logits(form):
        raise Refusal(
            ReasonKind.EMPTY_ROWS,
            f"a query may see no key, and {max(form.fills):g} added to its logits does not make them all equal",
        )
    if not added_gradient:
        return (), "mean"
    if not form.in_sums or op_name(view.reader.nodes[form.softmax]) not in SOFTMAXES:
        # Fused SDPA recomputes probabilities from a log-sum-exp in which the number of keys is lost beside the fill.
        raise Refusal(
            ReasonKind.GRADIENT,
            "a query may see no key, and an added finite fill then has a gradient that the op would drop",
        )
    return (), "even"


LOGIT = 1e6
"""Larger than any logit that a model produces, in absolute value."""


def _forgets_logits(form: AttentionForm) -> bool:
    """Whether the sum of a finite fill and a logit rounds to the fill: finfo.min does, -1e9 keeps logits above 32 in float32."""
    dtype = max((o.dtype for o in (form.q, form.k, form.v)), key=lambda d: d.itemsize)
    half_a_step = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 4
    return all(abs(fill) * half_a_step >= LOGIT for fill in form.fills)
