"""A `torch.compile` backend that proves and rewrites Native Sparse Attention onto sparse kernels.

``torch.compile(model, backend="fsa")`` needs no import of this package. Importing it has no side effects and loads neither
torch nor Triton: everything that needs them is an attribute that loads on first use.

* `explain` tells what a compilation would do, `last_report` what the latest one did.
* `VerificationError` is what ``options={"verify": True}`` raises.
* `ops` has the attention ops as documented callables for hand-written models.
* `registry` has the patterns, and is where you add your own.
"""

from __future__ import annotations

import importlib
from typing import Any, TYPE_CHECKING

from fsa_compile.report import Counterexample, DataCheck, GraphReport, Proof, Reason, ReasonKind, Report, Site, Verdict

if TYPE_CHECKING:
    from fsa_compile import ops, registry
    from fsa_compile.backend import explain, last_report
    from fsa_compile.verify import VerificationError

__version__ = "0.1.0"

__all__ = [
    "Counterexample",
    "DataCheck",
    "GraphReport",
    "Proof",
    "Reason",
    "ReasonKind",
    "Report",
    "Site",
    "VerificationError",
    "Verdict",
    "explain",
    "last_report",
    "ops",
    "registry",
]

_LAZY = {
    "explain": ("fsa_compile.backend", "explain"),
    "last_report": ("fsa_compile.backend", "last_report"),
    "ops": ("fsa_compile.ops", None),
    "registry": ("fsa_compile.registry", None),
    "VerificationError": ("fsa_compile.verify", "VerificationError"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
