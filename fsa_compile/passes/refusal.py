"""Why the analysis of a site stopped: an exception that carries the typed reason to the report."""

from __future__ import annotations

from ..report import Counterexample, Reason, ReasonKind


class Refusal(Exception):
    """The site stays as it is.

    Args:
        kind: Class of obstacle.
        text: One sentence for the user.
        counterexample: Where the nearest rule differs, if a proof failed.
        source: ``"file.py:41"`` of the line in the way, where known.

    Attributes:
        fitted: Whether the failed candidate had parameters that were fitted to the site.
    """

    def __init__(
        self, kind: ReasonKind, text: str, counterexample: Counterexample | None = None, source: str | None = None
    ) -> None:
        super().__init__(text)
        self.reason = Reason(kind, text, source)
        self.counterexample = counterexample
        self.fitted = False
