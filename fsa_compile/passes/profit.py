"""Whether an op can run where the site runs, and whether it pays."""

from __future__ import annotations

import torch

from ..report import ReasonKind
from . import dynamo_graph as dg
from .classify import Match
from .form_view import FormView
from .legality import Placement
from .reader import Reader
from .refusal import Refusal

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


def operand_dtype(match: Match) -> torch.dtype:
    """The dtype that the op computes in: the widest in which the model uses q, k and v."""
    form = match.form
    return torch.promote_types(torch.promote_types(form.q.dtype, form.k.dtype), form.v.dtype)


def weigh(r: Reader, match: Match, placement: Placement, always: bool) -> None:
    """Raises if the op cannot run, or (unless `always`) if it would be slower.

    Raises:
        Refusal: Of kind DTYPE, DEVICE, UNPROFITABLE or what the pattern says.
    """
    dtype = operand_dtype(match)
    if dtype not in DTYPES:
        raise Refusal(ReasonKind.DTYPE, f"the ops take floating point up to 64 bits, not {dtype}")
    q = dg.value(placement.q)
    assert isinstance(q, torch.Tensor)
    if q.device.type not in DEVICES:
        raise Refusal(ReasonKind.DEVICE, f"the ops run on {' and '.join(DEVICES)}, not on {q.device.type}")
    view = FormView(match.form, r)
    reason = match.pattern.supports(view, match.candidate, q.device, dtype)
    if reason is None and not always:
        reason = match.pattern.pays(view, match.candidate, q.device, dtype)
    if reason is not None:
        raise Refusal(reason.kind, reason.text, source=reason.source)
