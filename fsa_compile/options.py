"""The options of `torch.compile(..., backend="fsa", options={...})`.

Our own keys are the fields of `Options`. Every other key must be one of Inductor's (`torch._inductor.list_options()`) and is
passed on to it. Anything else is an error that names the right keys, because a misspelt option that is silently ignored
costs its user an afternoon.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, Literal

Inner = Literal["inductor", "aot_eager", "eager"]
Detail = Literal["off", "summary", "full"]
Profit = Literal["auto", "always"]
Selections = Literal["fused", "keep"]

_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True)
class Options:
    """How one compilation behaves. Immutable and hashable.

    Args:
        inner: What compiles the graph after the rewrite: ``"inductor"``, ``"aot_eager"`` (AOTAutograd without code
            generation: seconds instead of a minute) or ``"eager"``.
        strict: Raise internal errors instead of compiling the user's graph unchanged and noting the error in the report.
        report: What is printed to stderr while compiling. The environment variable ``FSA_REPORT`` sets the default.
        disable: Names of patterns that must not fire.
        only: If not empty, the names of the only patterns that may fire.
        profit: ``"auto"`` refuses a rewrite that is expected to be slower than the user's code, ``"always"`` does not ask.
        selection: ``"fused"`` replaces the scores and the top-k that choose blocks, where they are proven to rank as
            `fsa::select_blocks` does; ``"keep"`` leaves them to the model.
        proof_seconds: Seconds for all proofs of one graph, and for reading one site; a site for which none are left is refused as
            undecided.
        differential: Compare each rewritten region with its op on made-up data, in float64, while compiling. The environment
            variable ``FSA_DIFFERENTIAL`` sets the default.
        verify: Compare the first call of each rewritten graph with eager, forward and gradients, and raise if they differ.

    Example:
        >>> options, inductor = Options.parse({"inner": "aot_eager", "max_autotune": True})
        >>> options.inner, inductor
        ('aot_eager', {'max_autotune': True})
    """

    inner: Inner = "inductor"
    strict: bool = False
    report: Detail = "off"
    disable: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    profit: Profit = "auto"
    selection: Selections = "fused"
    proof_seconds: float = 2.0
    differential: bool = False
    verify: bool = False

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any] | None,
        *,
        pattern_names: Callable[[], Collection[str]] | None = None,
    ) -> tuple[Options, dict[str, Any]]:
        """Split what the user gave into our options and Inductor's.

        Args:
            given: The mapping passed as `options=` to `torch.compile`.
            pattern_names: Called only if `disable` or `only` is given; returns the names that they may hold.

        Returns:
            Our options, and Inductor's as a new dictionary with its own spelling of the keys.

        Raises:
            ValueError: A key is neither ours nor Inductor's, or a value of ours is not one that the option takes.
        """
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"options must be a dictionary, got {given!r}")
        ours: dict[str, Any] = {}
        inductor: dict[str, Any] = {}
        if (printed := os.environ.get("FSA_REPORT")) is not None:
            ours["report"] = _choice("environment variable FSA_REPORT", printed.lower(), Detail)
        if (switch := os.environ.get("FSA_DIFFERENTIAL")) is not None:
            ours["differential"] = _is_on(switch)
        for key, value in (given or {}).items():
            if key in _CHECKS:
                ours[key] = _CHECKS[key](f"option {key!r}", value)
            else:
                inductor[_inductor_key(key)] = value
        for key in ("disable", "only"):
            if ours.get(key) and pattern_names is not None:
                _known_patterns(f"option {key!r}", ours[key], pattern_names())
        return cls(**ours), inductor


def disabled() -> bool:
    """Whether the environment variable ``FSA_DISABLE`` asks for every graph to be handed over untouched."""
    return _is_on(os.environ.get("FSA_DISABLE", ""))


def _is_on(switch: str) -> bool:
    return switch.strip().lower() not in _FALSE


def _choice(what: str, value: Any, kind: Any) -> str:
    allowed = get_args(kind)
    if value not in allowed:
        raise ValueError(f"{what} must be one of {_listed(allowed)}, got {value!r}{_suggestion(value, allowed)}")
    return value


def _flag(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be True or False, got {value!r}")
    return value


def _names(what: str, value: Any) -> tuple[str, ...]:
    # A string is an iterable of strings too; taking "selected" letter by letter would be a silly error to report.
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} must be a list of pattern names, got {value!r}")
    return tuple(value)


def _seconds(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{what} must be a positive number of seconds, got {value!r}")
    return float(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "inner": lambda what, value: _choice(what, value, Inner),
    "strict": _flag,
    "report": lambda what, value: _choice(what, value, Detail),
    "disable": _names,
    "only": _names,
    "profit": lambda what, value: _choice(what, value, Profit),
    "selection": lambda what, value: _choice(what, value, Selections),
    "proof_seconds": _seconds,
    "differential": _flag,
    "verify": _flag,
}
assert set(_CHECKS) == {f.name for f in fields(Options)}, "every option needs a check"


def _inductor_key(key: Any) -> str:
    """Inductor's own spelling of `key`, which it accepts with dashes too."""
    from torch._inductor import list_options

    known = list_options()
    if isinstance(key, str) and (name := key.replace("-", "_")) in known:
        return name
    raise ValueError(
        f"unknown option {key!r}{_suggestion(key, [*_CHECKS, *known])}. Options of fsa: {_listed(_CHECKS)}; "
        "every option of Inductor (see torch._inductor.list_options()) is passed on to it"
    )


def _known_patterns(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: there is no pattern {name!r}{_suggestion(name, known)}. Patterns: {_listed(known)}")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(repr(value) for value in sorted(values))


def _suggestion(value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""
