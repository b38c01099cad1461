"""The ordered, named set of patterns that the backend tries at every site."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import entry_points

from .builtin import BUILTIN
from .pattern import Pattern

ENTRY_POINT_GROUP = "fsa_compile.patterns"
"""Packages may offer patterns: entry points that load to a `Pattern` instance."""

_patterns: dict[str, Pattern] = {p.name: p for p in BUILTIN}
_discovered = False


def _discover() -> None:
    global _discovered
    if not _discovered:
        _discovered = True
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name not in _patterns:
                register(point.load())


def patterns() -> tuple[Pattern, ...]:
    """All patterns in the order in which they are tried: the user's, latest first, then the built-in ones."""
    _discover()
    return tuple(_patterns.values())


def names() -> tuple[str, ...]:
    """The names that ``options={"disable": [...], "only": [...]}`` accept."""
    return tuple(p.name for p in patterns())


def register(pattern: Pattern) -> Pattern:
    """Adds a pattern in front of the others, or replaces the one of the same name in its place.

    Args:
        pattern: What to add. Its `name` must be a non-empty string.

    Raises:
        TypeError: If it is not a `Pattern`.
        ValueError: If it has no name.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"register: pattern must be a Pattern, got {type(pattern).__name__}")
    if not isinstance(pattern.name, str) or not pattern.name:
        raise ValueError("register: pattern.name must be a non-empty string")
    if pattern.name in _patterns:
        _patterns[pattern.name] = pattern
    else:
        rest = dict(_patterns)
        _patterns.clear()
        _patterns.update({pattern.name: pattern, **rest})
    return pattern


def unregister(name: str) -> None:
    """Removes a pattern.

    Raises:
        KeyError: If there is none of that name.
    """
    if name not in _patterns:
        raise KeyError(f"unregister: no pattern named {name!r}; there are {', '.join(_patterns)}")
    del _patterns[name]


@contextlib.contextmanager
def override(*new: Pattern, disable: tuple[str, ...] = ()) -> Iterator[None]:
    """Within the block: `new` patterns registered, those named in `disable` gone."""
    saved = dict(_patterns)
    try:
        for p in new:
            register(p)
        for name in disable:
            unregister(name)
        yield
    finally:
        _patterns.clear()
        _patterns.update(saved)
