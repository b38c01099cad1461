"""What was judged in one graph, for equal parts of the graphs after it: 32 checkpointed layers are 32 graphs of one part each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from .buffers import Buffers
from .judge import Judged
from .parts import Repeated, held_buffers


@dataclass(frozen=True, eq=False)
class Precedent:
    """A part that was analysed.

    Attributes:
        ranked: Its nodes and inputs by rank.
        judged: The sites in it.
    """

    ranked: Sequence[Node]
    judged: tuple[Judged, ...]

    def copies(self, group: Repeated) -> Iterator[tuple[Judged, Mapping[Node, Node]]]:
        """Each site with what stands for the nodes of the precedent in each of the parts of `group`."""
        for ranked in group.ranked:
            counterpart = dict(zip(self.ranked, ranked))
            for j in self.judged:
                yield j, counterpart


class Precedents:
    """The parts that were analysed in one compilation.

    Args:
        buffers: Its buffers: an equal part holds equal ones.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self._known: dict[object, list[Precedent]] = {}

    def of(self, group: Repeated) -> Precedent | None:
        """The precedent of equal parts."""
        for known in self._known.get(group.description, ()):
            if held_buffers(known.ranked, self.buffers) == held_buffers(group.ranked[0], self.buffers):
                return known
        return None

    def add(self, groups: Iterable[Repeated], judged: Iterable[Judged]) -> None:
        """Remember what was analysed.

        Args:
            groups: Parts, equal ones together.
            judged: The sites in them.
        """
        judged = list(judged)
        for group in groups:
            inside = tuple(j for j in judged if j.node in group.part.own)
            self._known.setdefault(group.description, []).append(Precedent(group.ranked[0], inside))
