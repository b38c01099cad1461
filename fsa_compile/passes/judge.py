"""The verdict on every attention site of a graph: which op it is, why none, or that it is left alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from ..options import Options
from ..registry.registry import patterns as registered
from ..report import Proof, Reason, ReasonKind, Selection, Site, Verdict
from . import dynamo_graph as dg
from . import expr as x
from .appearance import appearance
from .buffers import Buffer, Buffers
from .classify import Match, classify
from .legality import Placement, Surroundings, needs_grad, place
from .parts import Repeated
from .profit import weigh, weigh_selection
from .prove import Prover
from .ranking import MaximumRanking, ProbabilityRanking, ranking
from .reader import Reader, Unreadable
from .refusal import Refusal
from .shadow import Shadow, dynamo_node
from .sites import SiteNodes, find_sites, unmatched_weights

UNKNOWN = "unknown"
"""The role of a site that is none of the known ones, or was not looked at far enough to tell."""
LEAST_SHARE = 0.1
"""Of the time for proofs: what each site gets, however long others took."""
UNROLLED = 8
"""From so many sites on one line of one module on, a loop is unrolled."""


@dataclass(frozen=True)
class Fusion:
    """An op in the place of the scores and the top-k of a selected site.

    Attributes:
        ranking: Which, and with which parameters.
        compressed: Where the branch stands whose probabilities it sums, if it does.
        place: The selected site, with what the op reads among its operands.
    """

    ranking: ProbabilityRanking | MaximumRanking
    compressed: Placement | None
    place: Placement

    def in_copy(self, counterpart: Mapping[Node, Node]) -> Fusion:
        """The same in a repetition of the part of the graph."""
        compressed = self.compressed.in_copy(counterpart) if self.compressed is not None else None
        return Fusion(self.ranking, compressed, self.place.in_copy(counterpart))


@dataclass(frozen=True)
class Judged:
    """A site with its verdict.

    Attributes:
        site: As the report shows it.
        node: The Dynamo node that the report names.
        match, placement: What takes its place, and where; None if it is not to be rewritten.
        relies_on: The buffers on whose value the verdict may rest.
        fusion: Of a selected site: the op that makes its list.
        elsewhere: Of a site that is proven, and refused for what lies around it: the verdict on it in other surroundings.
    """

    site: Site
    node: Node | None
    match: Match | None = None
    placement: Placement | None = None
    relies_on: tuple[Buffer, ...] = ()
    fusion: Fusion | None = None
    elsewhere: Judged | None = None

    def refuse(self, reason: Reason) -> Judged:
        """Not to be rewritten after all."""
        return Judged(self.site.refuse(reason), self.node)


class Judge:
    """Judges the sites of one graph.

    Args:
        r: Reader of the shadow.
        shadow: The shadow of the first of each group of equal parts.
        surroundings: The Dynamo graph around them.
        buffers: Its inputs that have a value.
        options: What may be done, and the time for proofs.
    """

    def __init__(self, r: Reader, shadow: Shadow, surroundings: Surroundings, buffers: Buffers, options: Options) -> None:
        self.r, self.shadow, self.buffers, self.options = r, shadow, buffers, options
        self.surroundings = surroundings
        self.prover = Prover(r, options.proof_seconds)
        self.in_vain = 0.0
        """Seconds that went into sites that are not rewritten."""
        self.patterns = [p for p in registered() if not _disabled(p.name, options)]

    def judge(self, groups: Sequence[Repeated]) -> list[Judged]:
        """The sites of all parts and of their repetitions. Only the first of equal parts is analysed."""
        sites = list(find_sites(self.r))
        blank = [(self._blank(nodes), nodes) for nodes in sites]
        copied = [(j, copy) for j, _ in blank for copy in _copies(j, groups)]
        turns = Counter(_line(j.site) for j, _ in blank) + Counter(_line(_renamed(j.site, copy[j.node])) for j, copy in copied)
        judged = self._with_selections(list(self._judge_turns(blank, turns)))
        for nodes in unmatched_weights(self.r, sites):
            text = "an exponential is contracted like a softmax, but is not divided by its own sum in a form that is known"
            judged.append(self._blank(nodes).refuse(Reason(ReasonKind.NOT_ATTENTION, text)))
        return judged + [judged_again(j, copy, self.surroundings, self.buffers) for j in judged for copy in _copies(j, groups)]

    def _blank(self, nodes: SiteNodes) -> Judged:
        """The site as the report names it, nothing decided yet."""
        node = dynamo_node(self.shadow, nodes.contraction)
        source, module = (dg.source_of(node), dg.module_of(node)) if node is not None else ("?", "")
        name = node.name if node is not None else nodes.contraction.name
        return Judged(Site(role=UNKNOWN, verdict=Verdict.REFUSED, source=source, node=name, module=module), node)

    def _judge_turns(self, sites: Sequence[tuple[Judged, SiteNodes]], turns: Counter[tuple[str, str]]) -> Iterator[Judged]:
        """Of an unrolled loop only the first turn is analysed, unless that can be rewritten."""
        unrolled: dict[tuple[str, str], bool] = {}
        for blank, nodes in sites:
            line = _line(blank.site)
            if not unrolled.get(line):
                judged = self._judge(blank, nodes)
                if line not in unrolled:
                    unrolled[line] = turns[line] >= UNROLLED and judged.match is None
                if not unrolled[line]:
                    yield judged
                    continue
            text = f"a Python loop over queries or heads, unrolled {turns[line]} times: write it as one batched attention"
            yield blank.refuse(Reason(ReasonKind.UNROLLED_LOOP, text))

    def _judge(self, blank: Judged, nodes: SiteNodes) -> Judged:
        """The verdict on one site. All sites that come to nothing share the time for proofs; each gets at least a share of it."""
        start = time.thread_time()
        wanted = dict(self.r.sizes.wanted)
        try:
            with x.time_limit(max(self.options.proof_seconds - self.in_vain, LEAST_SHARE * self.options.proof_seconds)):
                judged = self._verdict(blank, nodes)
        except (x.TimeSpent, RecursionError) as spent:
            if isinstance(spent, x.TimeSpent):
                text = f"not decided in time: which keys are seen takes longer to read than options['proof_seconds'] allow"
            else:
                text = "not decided: which keys are seen depends on too many steps, each within the one before"
            judged = replace(blank, site=_refused(blank.site, Refusal(ReasonKind.UNDECIDED, text)))
        if judged.match is None and judged.site.verdict is not Verdict.LEFT:
            self.in_vain += time.thread_time() - start
        else:
            self.r.sizes.wanted = wanted
        return judged

    def _verdict(self, blank: Judged, nodes: SiteNodes) -> Judged:
        """The verdict on one site, in whatever time it takes."""
        site = blank.site
        try:
            grad = needs_grad(self.shadow, nodes.contraction)
            match = classify(self.r, nodes, frozenset(self.shadow.standing_for), self.patterns, self.prover, grad)
            site = replace(site, role=match.candidate.role, parameters=_parameters(match, self.r), proofs=match.proofs)
            if not match.pattern.rewrites:
                reason = Reason(ReasonKind.NOT_SPARSE, f"{match.pattern.name} attention: left to the inner compiler")
                return replace(blank, site=replace(site, verdict=Verdict.LEFT, reason=reason))
            placement = place(self.r, self.shadow, match)
            weigh(self.r, match, placement, always=self.options.profit == "always")
            proven = replace(site, verdict=Verdict.REWRITTEN)
            judged = Judged(proven, blank.node, match, placement, tuple(self.r.relied.values()))
            try:
                self.surroundings.allow(placement)
            except Refusal as refusal:
                return Judged(_refused(site, refusal), blank.node, elsewhere=judged)
            return judged
        except Refusal as refusal:
            role = appearance(self.r, nodes.softmax) if site.role == UNKNOWN else None
            return replace(blank, site=_refused(replace(site, role=role or site.role), refusal))
        except Unreadable as fault:
            return replace(blank, site=_refused(site, Refusal(ReasonKind.NOT_ATTENTION, f"not understood: {fault}")))
        except (x.TimeSpent, RecursionError):
            raise
        except Exception as fault:
            if self.options.strict:
                raise
            return replace(blank, site=site.refuse(internal(fault)))

    def _with_selections(self, judged: list[Judged]) -> list[Judged]:
        """The selected sites with what chooses their blocks."""
        if self.options.selection == "keep":
            return judged
        compressed = {j.match.form.softmax: j for j in judged if j.match is not None}
        return [self._with_selection(j, compressed) if j.match and j.match.candidate.blocks else j for j in judged]

    def _with_selection(self, j: Judged, others: Mapping[str, Judged]) -> Judged:
        assert j.match is not None and j.placement is not None
        try:
            branches = {name: o.match for name, o in others.items() if o.match is not None}
            with x.time_limit(self.options.proof_seconds):
                found = ranking(self.r, j.match, branches, self.prover, frozenset(self.shadow.standing_for))
            if isinstance(found, ProbabilityRanking):
                compressed = others[found.compressed].placement
                assert compressed is not None
                reads = compressed.operands
            else:
                compressed, reads = None, tuple(self.shadow.standing_for[self.r.nodes[o.node]][0] for o in (found.q, found.k))
            fusion = Fusion(found, compressed, j.placement.reading(reads))
            self.surroundings.allow(fusion.place)
            weigh_selection(self.r, found, j.match, branches, reads[0], always=self.options.profit == "always")
            selection = Selection(True, parameters=found.parameters(), proofs=found.proofs)
            return replace(
                j, site=replace(j.site, selection=selection), fusion=fusion, relies_on=tuple(self.r.relied.values())
            )
        except Refusal as refusal:
            reason = refusal.reason
        except (x.TimeSpent, RecursionError):
            text = "not decided in time: the scores take longer to read than options['proof_seconds'] allow"
            reason = Reason(ReasonKind.UNDECIDED, text)
        except Exception as fault:
            if self.options.strict:
                raise
            reason = internal(fault)
        return replace(j, site=replace(j.site, selection=Selection(False, reason)))


def internal(fault: Exception) -> Reason:
    """The reason for a fault of ours."""
    return Reason(ReasonKind.INTERNAL, f"fault of fsa_compile: {type(fault).__name__}: {fault}")


def judged_again(j: Judged, copy: Mapping[Node, Node], surroundings: Surroundings, buffers: Buffers) -> Judged:
    """The verdict on a site of a repetition, whose surroundings may differ.

    Args:
        j: The site that was analysed.
        copy: What stands in the repetition for its nodes.
        surroundings, buffers: Of the graph of the repetition.
    """
    j = j.elsewhere or j
    assert j.node is not None
    node = copy[j.node]
    proofs = tuple(Proof(p.obligation, f"same as {j.site.node}", 0.0) for p in j.site.proofs)
    site = replace(_renamed(j.site, node), proofs=proofs)
    if j.match is None or j.placement is None:
        return Judged(site, node)
    placement = j.placement.in_copy(copy)
    try:
        surroundings.allow(placement)
    except Refusal as refusal:
        return Judged(_refused(site, refusal), node)
    held = (buffers.of(there) for here, there in copy.items() if buffers.of(here) in j.relies_on)
    fusion = None
    if j.fusion is not None:
        try:
            fusion = j.fusion.in_copy(copy)
            surroundings.allow(fusion.place)
        except (KeyError, Refusal) as fault:
            other = Reason(ReasonKind.SCORES, "what the scores are made of stands in another part of the model")
            reason = fault.reason if isinstance(fault, Refusal) else other
            fusion, site = None, replace(site, selection=Selection(False, reason))
    return Judged(site, node, j.match, placement, tuple(b for b in held if b is not None), fusion)


def _refused(site: Site, refusal: Refusal) -> Site:
    reason = refusal.reason if refusal.reason.source else replace(refusal.reason, source=site.source)
    return replace(site.refuse(reason), counterexample=refusal.counterexample)


def _disabled(name: str, options: Options) -> bool:
    return name in options.disable or bool(options.only) and name not in options.only


def _copies(j: Judged, groups: Sequence[Repeated]) -> Sequence[Mapping[Node, Node]]:
    """The repetitions of the part that a site is in."""
    return next((g.copies for g in groups if j.node in g.part.own), ())


def _renamed(site: Site, node: Node) -> Site:
    return replace(site, node=node.name, module=dg.module_of(node), source=dg.source_of(node))


def _line(site: Site) -> tuple[str, str]:
    return site.source, site.module


def _parameters(match: Match, r: Reader) -> dict[str, object]:
    form = match.form
    shared: dict[str, object] = {"scale": form.scale, "heads": form.groups * form.kv_heads, "kv_heads": form.kv_heads}
    if form.temperatures:
        shared["temperature"] = ", ".join(("1 / " if t.inverse else "") + r.place(t.node)[0] for t in form.temperatures)
    empty = {"empty_rows": match.empty_value} if match.empty_value is not None else {}
    return {**match.candidate.parameters, **shared, **empty}
