"""One Dynamo graph through all passes: shadow, sites, lift, prove, legality, profit, rewrite."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..options import Options
from ..report import GraphReport, Site, Verdict
from . import dynamo_graph as dg
from .buffers import Buffers
from .differential import known_values, Mismatch, SecondLine
from .judge import Fusion, internal, Judge, judged_again, Judged
from .legality import Surroundings
from .parts import attention_parts, Repeated, repeated, to_trace
from .precedents import Precedents
from .reader import Reader
from .refusal import Refusal
from .region import Original
from .rewrite import Emission, Rewriter
from .shadow import Shadow, dynamo_node, trace
from .sizes import Sizes


@dataclass
class _Clock:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._start, 4)
        self._start = now


def analyse_and_rewrite(
    gm: GraphModule,
    options: Options,
    *,
    name: str,
    rewrite: bool = True,
    buffers: Buffers | None = None,
    original: Original | None = None,
    grad: object = None,
    precedents: Precedents | None = None,
) -> tuple[GraphReport, ...]:
    """Analyse a Dynamo graph and the checkpoint bodies in it, and put the ops in.

    Args:
        gm: The graph; its nodes carry ``meta["example_value"]``. Mutated in place.
        options: What may be done.
        name: What reports call the graph.
        rewrite: False to analyse only.
        buffers: The inputs whose value may be read; it learns which of them the rewrites rely on.
        original: A copy of the graph, which learns what was replaced.
        grad: Whether gradients are recorded when the graph is entered; None for the mode in force, which is the one that
            Dynamo compiles the graph for.
        precedents: What was analysed in the graphs around this one.

    Returns:
        One report per graph body. A fault of ours before the rewrite leaves the body as it was and is reported.

    Raises:
        Exception: Any fault of ours, under ``options.strict``.
    """
    buffers = Buffers(gm, ()) if buffers is None else buffers
    precedents = Precedents(buffers) if precedents is None else precedents
    modes = dg.modes(gm.graph, torch.is_grad_enabled() if grad is None else grad)
    if original is None and rewrite and options.differential:
        original = Original(gm)
    entered = [modes[call].grad for call, _ in dg.body_calls(gm)]
    reports = [_one_body(gm, modes, options, name, rewrite, buffers, precedents, original)]
    for (attribute, body), mode in zip(dg.bodies(gm), entered, strict=True):
        below = original.bodies[attribute] if original is not None else None
        within = f"{name} / {attribute}"
        reports += analyse_and_rewrite(
            body, options, name=within, rewrite=rewrite, buffers=buffers, original=below, grad=mode, precedents=precedents
        )
    return tuple(reports)


def _one_body(
    gm: GraphModule,
    modes: Mapping[Node, dg.Modes],
    options: Options,
    name: str,
    rewrite: bool,
    buffers: Buffers,
    precedents: Precedents,
    original: Original | None,
) -> GraphReport:
    nodes = sum(map(dg.is_call, gm.graph.nodes))
    clock = _Clock()
    notes = _notes(gm)
    try:
        judged = _analyse(gm, modes, options, clock, buffers, precedents)
    except Exception as fault:
        if options.strict:
            raise
        notes.append(f"fsa_compile failed and left the graph as it was: {type(fault).__name__}: {fault}")
        return GraphReport(name, nodes, notes=tuple(notes), seconds=clock.seconds)
    relied = {b.position: b for j in judged if j.match is not None for b in j.relies_on}
    if relied:
        buffers.rely_on(relied.values())
        labels = ", ".join(sorted({b.label for b in relied.values()}))
        notes.append(f"relies on the value of {labels}, which is checked at each call")
    # From here on the graph changes; a fault that does not undo itself must reach the caller.
    sites = [j.site for j in judged]
    if rewrite and judged:
        known = known_values(original, gm, buffers) if original is not None else {}
        sites = _rewrite(gm, judged, options, original, known)
    clock.lap("rewrite")
    return GraphReport(name, nodes, tuple(sites), tuple(notes), clock.seconds)


def _analyse(
    gm: GraphModule, modes: Mapping[Node, dg.Modes], options: Options, clock: _Clock, buffers: Buffers, precedents: Precedents
) -> list[Judged]:
    """The sites of one graph, in graph order."""
    groups = [(g, precedents.of(g)) for g in repeated(gm, attention_parts(gm), modes, buffers)]
    fresh = [g for g, precedent in groups if precedent is None]
    clock.lap("find")
    shadow = trace(gm, *to_trace(gm, [g.part for g in fresh])) if fresh else None
    clock.lap("shadow")
    if not groups:
        return []
    surroundings = Surroundings(gm.graph, modes)
    judged: list[Judged] = []
    if shadow is not None:
        judged = _judge(shadow, surroundings, buffers, options, fresh)
        precedents.add(fresh, judged)
    known = [(j, copy) for g, precedent in groups if precedent is not None for j, copy in precedent.copies(g)]
    judged += [judged_again(j, copy, surroundings, buffers) for j, copy in known]
    order = surroundings.order
    judged.sort(key=lambda j: order.get(j.node, len(order)) if j.node is not None else len(order))
    clock.lap("lift and prove")
    return judged


ROUNDS = 4
"""So often a graph is judged again under equalities of sizes that a proof would have needed."""


def _judge(
    shadow: Shadow, surroundings: Surroundings, buffers: Buffers, options: Options, groups: Sequence[Repeated]
) -> list[Judged]:
    """The sites of the first of equal parts. Where a proof fails for want of an equality of dynamic sizes that holds now, such as
    the lengths of keys and values, it is assumed; what then is rewritten that was not before is worth a guard."""

    def under(sizes: Sizes) -> list[Judged]:
        reader = Reader(shadow.graph_module, buffers.read_by(shadow), functools.partial(_place, shadow), sizes)
        return Judge(reader, shadow, surroundings, buffers, options).judge(groups)

    sizes = Sizes()
    judged, worth = under(sizes), ()
    best, assumed, wanted = _gained(judged), (), tuple(sizes.wanted)
    for _ in range(ROUNDS):
        if not wanted:
            break
        # A number serves one size only, and under the equalities it may not be wanted any more.
        assumed += tuple(w for w in wanted if not any(side.is_number for side in w.args)) or wanted
        sizes = Sizes(assumed)
        gained = _gained(under(sizes))
        if gained > best:
            best, worth = gained, assumed
        wanted = tuple(w for w in sizes.wanted if w not in assumed)
    if not worth:
        return judged
    sizes.guard(worth)
    return under(Sizes())


def _gained(judged: Sequence[Judged]) -> tuple[int, int]:
    """How many sites are rewritten, and how many with their selections."""
    return sum(j.match is not None for j in judged), sum(j.fusion is not None for j in judged)


def _rewrite(
    gm: GraphModule,
    judged: Sequence[Judged],
    options: Options,
    original: Original | None,
    known: Mapping[Node, Tensor],
) -> list[Site]:
    rewriter = Rewriter(gm.graph)
    sites = []
    for j in judged:
        site = j.site
        if j.match is not None and j.placement is not None:
            try:
                second = None
                if original is not None:
                    second = SecondLine(original, site, j.match, j.placement, options, rewriter.replaced, known)
                rewriter.rewrite(j.match, j.placement, second)
                site = replace(site, checks=tuple(second.checks) if second else ())
            except Emission as fault:  # undone by the rewriter
                if isinstance(fault.cause, Refusal) and not (options.strict and isinstance(fault.cause, Mismatch)):
                    site = site.refuse(fault.cause.reason)
                elif options.strict:
                    raise fault.cause from None
                else:
                    site = site.refuse(internal(fault.cause))
        sites.append(site)
    for k, j in enumerate(judged):
        if j.fusion is not None and sites[k].verdict is Verdict.REWRITTEN:
            sites[k] = _fuse(rewriter, j, j.fusion, sites[k], options, original, known)
    if rewriter.replaced:
        gm.graph.lint()
        gm.recompile()
    return sites


def _fuse(
    rewriter: Rewriter,
    j: Judged,
    fusion: Fusion,
    site: Site,
    options: Options,
    original: Original | None,
    known: Mapping[Node, Tensor],
) -> Site:
    """The site with its selection, fused if that can be written down."""
    assert j.match is not None and j.placement is not None and site.selection is not None
    selection, second = site.selection, None
    if original is not None:
        second = SecondLine(original, site, j.match, fusion.place, options, rewriter.replaced, known, verified=False)
    try:
        rewriter.fuse_selection(j.match, j.placement, fusion, second)
        selection = replace(selection, checks=tuple(second.checks) if second else ())
    except Emission as fault:  # undone by the rewriter
        refused = isinstance(fault.cause, Refusal) and not (options.strict and isinstance(fault.cause, Mismatch))
        if options.strict and not refused:
            raise fault.cause from None
        selection = selection.keep(fault.cause.reason if isinstance(fault.cause, Refusal) else internal(fault.cause))
    return replace(site, selection=selection)


def _place(shadow: Shadow, name: str) -> tuple[str, str | None]:
    """What the user calls a shadow node, and the line where it is made; of an input, the line where it is used first."""
    node = next((n for n in shadow.graph_module.graph.nodes if n.name == name), None)
    made = dynamo_node(shadow, node) if node is not None else None
    if made is None:
        return name, None
    lines = (dg.source_of(n) for n in ([made] if dg.is_call(made) else made.users))
    return dg.label_of(made), next((line for line in lines if line != "?"), None)


def _notes(gm: GraphModule) -> list[str]:
    """Barriers that the user may want to know of."""
    out = []
    transformed = dg.transformed(gm.graph)
    for n in gm.graph.nodes:
        if n in transformed:
            if dg.target_name(n) in dg.SOFTMAX_TARGETS:
                advice = ": write the batch as a dimension" if transformed[n] == "vmap" else ""
                out.append(f"{dg.source_of(n)}: attention inside of torch.func.{transformed[n]} is not looked at{advice}")
        elif n.op == "call_function" and dg.is_higher_order(n) and "checkpoint" not in str(n.target) and not dg.is_flex(n):
            out.append(f"{dg.source_of(n)}: {n.target} is left whole; attention inside of it is not looked at")
        elif dg.target_name(n) in dg.WHOLE:
            out.append(f"{dg.source_of(n)}: {dg.target_name(n)} is one call; attention inside of it is not looked at")
    return sorted(set(out))
