"""One Dynamo graph through all passes: shadow, sites, lift, prove, legality, profit, rewrite."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch.fx import GraphModule, Node

from ..options import Options
from ..registry.pattern import Pattern
from ..registry.registry import patterns as registered
from ..report import GraphReport, Reason, ReasonKind, Site, Verdict
from . import dynamo_graph as dg
from .buffers import Buffers
from .classify import Match, classify
from .legality import Placement, needs_grad, place
from .profit import weigh
from .prove import Prover
from .reader import Reader
from .refusal import Refusal
from .rewrite import Emission, Rewriter
from .shadow import Shadow, trace
from .sites import SiteNodes, find_sites, unmatched_weights

T = TypeVar("T")


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
    gm: GraphModule, options: Options, *, name: str, rewrite: bool = True, buffers: Buffers | None = None
) -> tuple[GraphReport, ...]:
    """Analyse a Dynamo graph and the checkpoint bodies in it, and put the ops in.

    Args:
        gm: The graph; its nodes carry ``meta["example_value"]``. Mutated in place.
        options: What may be done.
        name: What reports call the graph.
        rewrite: False to analyse only.
        buffers: The inputs whose value may be read; it learns which of them the rewrites rely on.

    Returns:
        One report per graph body. A fault of ours before the rewrite leaves the body as it was and is reported.

    Raises:
        Exception: Any fault of ours, under ``options.strict``.
    """
    buffers = Buffers(gm, ()) if buffers is None else buffers
    reports = [_one_body(gm, options, name, rewrite, buffers)]
    for attribute, body in dg.bodies(gm):
        reports += analyse_and_rewrite(body, options, name=f"{name} / {attribute}", rewrite=rewrite, buffers=buffers)
    return tuple(reports)


def _one_body(gm: GraphModule, options: Options, name: str, rewrite: bool, buffers: Buffers) -> GraphReport:
    nodes = sum(map(dg.is_call, gm.graph.nodes))
    clock = _Clock()
    notes = _notes(gm)
    try:
        judged, reader = _analyse(gm, options, clock, buffers)
    except Exception as fault:
        if options.strict:
            raise
        notes.append(f"fsa_compile failed and left the graph as it was: {type(fault).__name__}: {fault}")
        return GraphReport(name, nodes, notes=tuple(notes), seconds=clock.seconds)
    if reader is not None and reader.relied and any(j.match is not None for j in judged):
        buffers.rely_on(reader.relied.values())
        labels = ", ".join(sorted({b.label for b in reader.relied.values()}))
        notes.append(f"relies on the value of {labels}, which is checked at each call")
    # From here on the graph changes; a fault that does not undo itself must reach the caller.
    sites = _rewrite(gm, reader, judged, options) if rewrite and reader is not None else [j.site for j in judged]
    clock.lap("rewrite")
    return GraphReport(name, nodes, tuple(sites), tuple(notes), clock.seconds)


@dataclass(frozen=True)
class _Judged:
    """A site with its verdict; a match and its place only if it is to be rewritten."""

    site: Site
    match: Match | None = None
    placement: Placement | None = None


def _analyse(gm: GraphModule, options: Options, clock: _Clock, buffers: Buffers) -> tuple[list[_Judged], Reader | None]:
    shadow = trace(gm)
    clock.lap("shadow")
    if shadow is None:
        return [], None
    reader = Reader(shadow.graph_module, buffers.read_by(shadow), functools.partial(_place, shadow))
    prover = Prover(reader, options.proof_seconds)
    candidates = [p for p in registered() if not _disabled(p.name, options)]
    sites = list(find_sites(reader))
    judged = _judge_all(reader, shadow, sites, candidates, prover, options)
    for nodes in unmatched_weights(reader, sites):
        text = "an exponential is contracted like a softmax, but is not divided by its own sum in a form that is known"
        judged.append(_Judged(_site(shadow, nodes).refuse(Reason(ReasonKind.NOT_ATTENTION, text))))
    clock.lap("lift and prove")
    return judged, reader


def _rewrite(gm: GraphModule, reader: Reader, judged: Sequence[_Judged], options: Options) -> list[Site]:
    rewriter = Rewriter(reader, gm.graph)
    sites = []
    for j in judged:
        site = j.site
        if j.match is not None and j.placement is not None:
            try:
                rewriter.rewrite(j.match, j.placement)
            except Emission as fault:  # undone by the rewriter
                if isinstance(fault.cause, Refusal):
                    site = site.refuse(fault.cause.reason)
                elif options.strict:
                    raise fault.cause from None
                else:
                    site = site.refuse(_internal(fault.cause))
        sites.append(site)
    if rewriter.replaced:
        gm.graph.lint()
        gm.recompile()
    return sites


def _disabled(name: str, options: Options) -> bool:
    return name in options.disable or bool(options.only) and name not in options.only


def _internal(fault: Exception) -> Reason:
    return Reason(ReasonKind.INTERNAL, f"fault of fsa_compile: {type(fault).__name__}: {fault}")


def _site(shadow: Shadow, nodes: SiteNodes) -> Site:
    """The site as the report names it, nothing decided yet."""
    last = _dynamo_node(shadow, nodes.contraction)
    return Site(
        role="unknown", verdict=Verdict.REFUSED, source=dg.source_of(last) if last is not None else "?",
        node=last.name if last is not None else nodes.contraction.name, module=dg.module_of(last) if last is not None else "",
    )  # fmt: skip


UNROLLED = 8
"""From so many sites on one line of one module on, a loop is unrolled."""


def _judge_all(
    r: Reader, shadow: Shadow, sites: Sequence[SiteNodes], candidates: Sequence[Pattern], prover: Prover, options: Options
) -> list[_Judged]:
    """The verdicts on all sites. Of an unrolled loop only the first turn is analysed, unless that can be rewritten."""
    blank = [_site(shadow, nodes) for nodes in sites]
    turns = Counter((s.source, s.module) for s in blank)
    unrolled: dict[tuple[str, str], bool] = {}
    judged = []
    for site, nodes in zip(blank, sites):
        line = (site.source, site.module)
        if not unrolled.get(line):
            judged.append(_judge(r, shadow, site, nodes, candidates, prover, options))
            if line not in unrolled:
                unrolled[line] = turns[line] >= UNROLLED and judged[-1].match is None
            if not unrolled[line]:
                continue
            judged.pop()
        text = f"a Python loop over queries or heads, unrolled {turns[line]} times: write it as one batched attention"
        judged.append(_Judged(site.refuse(Reason(ReasonKind.UNROLLED_LOOP, text))))
    return judged


def _judge(
    r: Reader,
    shadow: Shadow,
    site: Site,
    nodes: SiteNodes,
    candidates: Sequence[Pattern],
    prover: Prover,
    options: Options,
) -> _Judged:
    """The verdict on one site, which so far only has its place."""
    try:
        match = classify(r, nodes, frozenset(shadow.standing_for), candidates, prover, needs_grad(shadow, nodes.contraction))
        site = _with(site, role=match.candidate.role, parameters=_parameters(match), proofs=match.proofs)
        if not match.pattern.rewrites:
            text = f"{match.pattern.name} attention: left to the inner compiler"
            return _Judged(_with(site, verdict=Verdict.LEFT, reason=Reason(ReasonKind.NOT_SPARSE, text)))
        placement = place(r, shadow, match)
        weigh(r, match, placement, always=options.profit == "always")
        return _Judged(_with(site, verdict=Verdict.REWRITTEN), match, placement)
    except Refusal as refusal:
        reason = refusal.reason if refusal.reason.source else _with(refusal.reason, source=site.source)
        return _Judged(_with(site.refuse(reason), counterexample=refusal.counterexample))
    except Exception as fault:
        if options.strict:
            raise
        return _Judged(site.refuse(_internal(fault)))


def _with(data: T, **changes: object) -> T:
    return replace(data, **changes)  # type: ignore[type-var]


def _parameters(match: Match) -> dict[str, object]:
    form = match.form
    shared = {"scale": form.scale, "heads": form.groups * form.kv_heads, "kv_heads": form.kv_heads}
    empty = {"empty_rows": match.empty_value} if match.empty_value is not None else {}
    return {**match.candidate.parameters, **shared, **empty}


def _dynamo_node(shadow: Shadow, n: Node) -> Node | None:
    """The Dynamo node that made a shadow node, or the nearest one after it."""
    seen, todo = {n}, [n]
    while todo:
        s = todo.pop(0)
        if s in shadow.standing_for:
            return shadow.standing_for[s][0]
        for u in s.users:
            if u not in seen:
                seen.add(u)
                todo.append(u)
    return None


def _place(shadow: Shadow, name: str) -> tuple[str, str | None]:
    """What the user calls a shadow node, and the line where it is made; of an input, the line where it is used first."""
    node = next((n for n in shadow.graph_module.graph.nodes if n.name == name), None)
    made = _dynamo_node(shadow, node) if node is not None else None
    if made is None:
        return name, None
    lines = (dg.source_of(n) for n in ([made] if dg.is_call(made) else made.users))
    return dg.label_of(made), next((line for line in lines if line != "?"), None)


def _notes(gm: GraphModule) -> list[str]:
    """Barriers that the user may want to know of."""
    out = []
    for n in gm.graph.nodes:
        if n.op == "call_function" and dg.is_higher_order(n) and "checkpoint" not in str(n.target) and not dg.is_flex(n):
            out.append(f"{dg.source_of(n)}: {n.target} is left whole; attention inside of it is not looked at")
        elif dg.target_name(n) in dg.WHOLE:
            out.append(f"{dg.source_of(n)}: {dg.target_name(n)} is one call; attention inside of it is not looked at")
    return sorted(set(out))
