"""Compiled code that is right as long as some buffers hold what they held when it was compiled.

Before each call every buffer that a rewrite relies on is compared with a copy of its value. If one has changed, the graph
runs as the user wrote it, without sparse ops, until the value is back.

On the CPU the comparison is of all elements, at each call: whatever changed them, nothing goes unseen. On CUDA that would
make the host wait, so there the host compares only when torch knows of a change (another tensor, or another version of the
same one). The elements are still compared at each call, on the device: a change behind torch's back (through `.data`, or a
kernel of one's own) fails as a device-side assertion instead of giving a wrong result.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger("fsa_compile")


class Check:
    """Whether one argument still holds the value that it was compiled for.

    Args:
        position: Which argument.
        label: What the user calls it.
        value: What it has to hold: a copy, never written to.
        tensor: The tensor that held it when the code was compiled.
    """

    def __init__(self, position: int, label: str, value: torch.Tensor, tensor: torch.Tensor) -> None:
        self.position, self.label, self.value = position, label, value
        self._remember(tensor)

    def holds(self, t: Any) -> bool:
        if type(t) is not torch.Tensor or t.requires_grad or (t.shape, t.dtype) != (self.value.shape, self.value.dtype):
            return False
        if t.device != self.value.device:
            self.value = self.value.to(t.device)
        now, then = in_words(t, self.value)
        if _at_hand(t):
            return torch.equal(now, then)
        if self._tensor() is t and self._version == _version(t) is not None:
            torch._assert_async(
                (now == then).all(),
                f"{self.label} was changed behind torch's back (through .data, or a kernel) after it was compiled for "
                "backend 'fsa', which relies on its value: change it with copy_ or by assigning another tensor",
            )
            return True
        if not torch.equal(now, then):
            return False
        self._remember(t)
        return True

    def _remember(self, t: torch.Tensor) -> None:
        self._tensor, self._version = weakref.ref(t), _version(t)


def in_words(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape and dtype as 64-bit words where their memory allows: booleans compare 70 times faster so.

    Equal words are equal values. Equal values may differ in words, as 0.0 and -0.0 do.
    """
    if all(t.is_contiguous() and t.nbytes % 8 == t.storage_offset() * t.itemsize % 8 == 0 for t in (a, b)):
        return a.view(-1).view(torch.int64), b.view(-1).view(torch.int64)
    return a, b


def _at_hand(t: torch.Tensor) -> bool:
    """Whether the host compares elements: it does not wait for a CPU, and other devices than CUDA may have no assertions."""
    return t.device.type != "cuda"


def _version(t: torch.Tensor) -> int | None:
    """How often torch has written into a tensor, or None if it does not count."""
    return None if t.is_inference() else t._version


class CheckedCall:
    """Runs `compiled` while all checks hold, and `original` otherwise.

    Args:
        compiled: Right for the values that `checks` holds.
        original: Right for all values.
        checks: One for each buffer that matters.
        changed: Called with the labels of the buffers when some hold another value than at the call before.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        original: Callable[..., Any],
        checks: Sequence[Check],
        changed: Callable[[tuple[str, ...]], None],
    ) -> None:
        self.compiled, self.original, self.checks, self.changed = compiled, original, tuple(checks), changed
        self._broken: tuple[str, ...] = ()

    def __call__(self, *args: Any) -> Any:
        broken = tuple(c.label for c in self.checks if not c.holds(args[c.position]))
        if broken and broken != self._broken:
            self.changed(broken)
        self._broken = broken
        return self.original(*args) if broken else self.compiled(*args)
