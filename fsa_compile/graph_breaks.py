"""What to tell a user about a graph break: where it is, and what to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

import torch

TORCH = Path(torch.__file__).parent
ADVICE = (
    (r"\.item\(\)|Tensor\.item|_local_scalar_dense|to a Python (scalar|number)|Data.dependent operator",
     "pass the number as a Python int, or set torch._dynamo.config.capture_scalar_outputs"),
    (r"[Dd]ata.dependent (branch|jump|control|assert)|generic_jump", "decide with torch.where instead of an if on a tensor"),
    (r"nonzero|masked_select|boolean (mask|index)|[Dd]ynamic shape operator|dynamic output shape",
     "keep the size fixed: a mask instead of a selection of unknown length"),
    (r"\bprint\b|logging|logger|warn", "move printing, logging and warnings out of the model"),
    (r"numpy|\.cpu\(\)|\.tolist\(\)", "stay in torch inside of the model"),
)  # fmt: skip
"""By what Dynamo's reason says: what a user can do about it."""


def describe(reason: str, stack: Sequence[FrameSummary] | None) -> str:
    """``"reason (file.py:41): advice"``.

    Args:
        reason: Dynamo's text; its first line is kept, all of it decides about the advice.
        stack: The user's frames, the innermost last.
    """
    first = reason.strip().splitlines()[0] if reason.strip() else "unknown reason"
    where = _where(stack) if stack else ""
    line = (stack[-1].line or "") if stack else ""
    advice = next((text for pattern, text in ADVICE if re.search(pattern, f"{reason}\n{line}")), None)
    return f"{first}{where}" + (f"; {advice}" if advice is not None else "")


def _where(stack: Sequence[FrameSummary]) -> str:
    """The user's innermost line, and the line of torch that it calls where the break is in there."""
    inner = stack[-1]
    own = next((f for f in reversed(stack) if not Path(f.filename).is_relative_to(TORCH)), inner)
    below = "" if own is inner else f", in {Path(inner.filename).name}:{inner.lineno}"
    return f" ({Path(own.filename).name}:{own.lineno}{below})"
