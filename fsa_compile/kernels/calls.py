"""What every op does with its arguments before a kernel sees them."""

from __future__ import annotations

import torch
from torch import Tensor

# Note [Positions]
# Query i stands at position i + offset. The offset is an int (`q_offset`, symbolic under dynamic shapes) or one integer per
# batch row (`q_offsets`, which wins). The default None means m - n and is resolved inside of the op, where sizes are numbers.


def default_offset(q_offset: int | None, q: Tensor, k: Tensor) -> int:
    """Position of query 0: `q_offset`, or m - n."""
    return k.shape[2] - q.shape[2] if q_offset is None else q_offset


def full_precision(q: Tensor) -> torch.autocast:
    """Autocast off: it would narrow the float32 statistics and partial results."""
    return torch.autocast(q.device.type, enabled=False)
