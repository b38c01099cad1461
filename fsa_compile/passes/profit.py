"""Whether an op can run where the site runs, and whether it pays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from ..kernels.availability import why_no_maximum_kernel, why_no_selection_kernel
from ..report import ReasonKind
from . import dynamo_graph as dg
from .classify import Match
from .form_view import FormView
from .legality import Placement
from .ranking import MaximumRanking, ProbabilityRanking
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


def weigh_selection(
    r: Reader,
    found: ProbabilityRanking | MaximumRanking,
    selected: Match,
    branches: Mapping[str, Match],
    q: Node,
    always: bool,
) -> None:
    """Raises if (unless `always`) the op that ranks would be slower than scores and top-k of the model.

    On two CPU cores `fsa::select_blocks` makes a layer with three branches take 1.2 times as long at 4,096 tokens and 1.4 times at
    8,192, because it computes the logits of compressed keys again; on a GPU that is what makes it fast.

    Args:
        r: Reader of the shadow graph.
        found: How it ranks.
        selected: The branch that it ranks for.
        branches: The branches that are rewritten, by the name of their softmax.
        q: The Dynamo node of the queries that it ranks with.
        always: Whether not to ask.

    Raises:
        Refusal: Of kind UNPROFITABLE.
    """
    tensor = dg.value(q)
    assert isinstance(tensor, torch.Tensor)
    if tensor.device.type == "cpu" and not always:
        raise Refusal(ReasonKind.UNPROFITABLE, "on a CPU scores and top-k of the model are faster")
    n_keys = r.sizes.hint(selected.form.keys)
    blocks = found.block_size, n_keys, found.top_k, found.n_init, found.n_local
    if isinstance(found, MaximumRanking):
        dtype = torch.promote_types(found.q.dtype, found.k.dtype)
        why = why_no_maximum_kernel(tensor.device, dtype, found.heads, int(tensor.shape[-1]), *blocks)
    else:
        branch = branches[found.compressed]
        heads, head_dim = (branch.form.groups * branch.form.kv_heads, branch.form.kv_heads), r.sizes.hint(branch.form.sizes[3])
        rule = branch.candidate.parameters["stride"], found.kernel_size
        why = why_no_selection_kernel(tensor.device, operand_dtype(branch), heads, head_dim, *rule, *blocks)
    if why is not None and not always:
        raise Refusal(ReasonKind.UNPROFITABLE, f"no kernel selects such blocks: {why}")
