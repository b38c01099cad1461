"""Which graphs belong to one report.

Dynamo calls a backend once per graph: again after each graph break, and again whenever a guard fails. A `Session` gathers
the graphs of one top-level compiled callable; the `Journal` finds the session of a callable and remembers the latest one.
Plain data and a lock: nothing here imports torch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fsa_compile.report import GraphReport, Report


class Trace(NamedTuple):
    """Dynamo's identity of the compilation that a graph comes from.

    Args:
        frame: The Python frame (one code object) being compiled.
        compilation: How many times that frame has been compiled before.
        attempt: How many times this compilation has been restarted.
    """

    frame: int
    compilation: int
    attempt: int


@dataclass(frozen=True)
class _Entry:
    index: int
    trace: Trace | None
    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...]


class Session:
    """The graphs of one top-level compiled callable, in order of compilation."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._next = 0
        self._lock = threading.Lock()

    def begin(self, trace: Trace | None) -> str:
        """Name the graph that is about to be analysed: ``"graph 0"``, ``"graph 1 (recompilation of graph 0)"``.

        A compilation that Dynamo restarts hands over its graph a second time: the first is forgotten.
        """
        with self._lock:
            first: int | None = None
            if trace is not None:
                self._entries = [e for e in self._entries if not _superseded(e.trace, trace)]
                earlier = (e for e in self._entries if e.trace is not None and e.trace.frame == trace.frame)
                first = next((e.index for e in earlier if e.trace and e.trace.compilation != trace.compilation), None)
            self._next = self._entries[-1].index + 1 if self._entries else 0
            name = f"graph {self._next}"
            return name if first is None else f"{name} (recompilation of graph {first})"

    def add(self, trace: Trace | None, graphs: Iterable[GraphReport], notes: Iterable[str] = ()) -> None:
        """Record what was done to the graph that `begin` named: its root and its nested bodies."""
        with self._lock:
            self._entries.append(_Entry(self._next, trace, tuple(graphs), tuple(notes)))

    def report(self) -> Report:
        """Everything recorded so far; a note that several graphs share stands once."""
        with self._lock:
            entries = tuple(self._entries)
        return Report(
            graphs=tuple(graph for e in entries for graph in e.graphs),
            notes=tuple(dict.fromkeys(note for e in entries for note in e.notes)),
        )


def _superseded(old: Trace | None, new: Trace) -> bool:
    return old is not None and old[:2] == new[:2] and old.attempt != new.attempt


class Journal:
    """The sessions of all top-level callables that are alive, and the one that was compiled last."""

    def __init__(self) -> None:
        self._sessions: dict[int, Session] = {}
        self._latest = Session()
        self._lock = threading.Lock()

    def session(self, owner: object | None) -> Session:
        """The session of `owner`, which becomes the latest one; a new session if there is none yet.

        Args:
            owner: Stands for one top-level compiled callable, by identity, for as long as it lives. None is always new.
        """
        with self._lock:
            session = self._sessions.get(id(owner)) if owner is not None else None
            if session is None:
                session = Session()
                if owner is not None:
                    self._sessions[id(owner)] = session
                    # Another object may get the same id once this one is gone.
                    weakref.finalize(owner, self._sessions.pop, id(owner), None)
            self._latest = session
            return session

    def latest(self) -> Report:
        """The report of the session that a graph was last added to; empty if there has been none."""
        with self._lock:
            session = self._latest
        return session.report()

    def forget(self) -> None:
        """Start every callable afresh; the latest report can still be read."""
        with self._lock:
            self._sessions.clear()
