"""Patterns: the roles that attention can play, built-in and the user's own."""

from .pattern import BlockList, Candidate, Pattern, Segment, Tensors
from .registry import names, override, patterns, register, unregister

__all__ = [
    "BlockList", "Candidate", "Pattern", "Segment", "Tensors", "names", "override", "patterns", "register", "unregister",
]  # fmt: skip
