"""The ``fsa`` command: ``fsa doctor`` checks an installation, ``fsa patterns`` lists what is recognised."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of ``fsa doctor``.

    Args:
        ok: False if the package cannot do its work here; None if it can, but without something useful.
        what: What was looked at.
        text: What was found.
    """

    ok: bool | None
    what: str
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 if all is well, 1 if ``doctor`` found a fault.

    Args:
        arguments: Words after ``fsa``; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="fsa", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, registration, and whether the ops run here")
    commands.add_parser("patterns", help="the patterns that the backend looks for, in order")
    return {"doctor": _doctor, "patterns": _patterns}[parser.parse_args(arguments).command]()


def _doctor() -> int:
    findings = list(examine())
    width = max(len(finding.what) for finding in findings)
    for ok, what, text in findings:
        print(f"{'ok' if ok else '--' if ok is None else 'FAULT':5}  {what:{width}}  {text}")
    return int(any(finding.ok is False for finding in findings))


def examine() -> Iterator[Finding]:
    """What ``fsa doctor`` prints, line by line."""
    yield Finding(True, "python", platform.python_version())
    for package, missing in (("fsa_compile", False), ("torch", False), ("z3-solver", False), ("rich", False), ("triton", None)):
        try:
            yield Finding(True, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(missing, package, "not installed")
    yield _entry_point()
    yield _ops("cpu", "ops on the CPU")
    yield from _gpus()


def _entry_point() -> Finding:
    from fsa_compile.backend import fsa

    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fsa")
    loaded = [entry_point.load() for entry_point in found]
    if loaded == [fsa]:
        return Finding(True, "entry point", 'torch.compile(model, backend="fsa") finds this package')
    return Finding(False, "entry point", f"expected one registration, found {loaded}; install the package again with pip")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding(None, "GPU", "no CUDA device: everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        yield _ops(f"cuda:{i}", f"ops on cuda:{i}", name)


def _ops(device: str, what: str, name: str = "") -> Finding:
    """Each op, forward and backward, against scaled dot-product attention where all keys are selected."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from fsa_compile import ops

    try:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(1, 2, 64, 32, device=device, generator=generator, requires_grad=True) for _ in range(3))
        every_block = torch.arange(4, device=device).expand(1, 2, 64, 4)
        outputs = {
            "selected_attention": ops.selected_attention(q, k, v, every_block, block_size=16),
            "compressed_attention": ops.compressed_attention(q, k, v, stride=1, last=0),
            "sliding_window_attention": ops.sliding_window_attention(q, k, v, window=64),
        }
        expected = scaled_dot_product_attention(q, k, v, is_causal=True)
        expected_gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
        for op, out in outputs.items():
            gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
            # Blocked sums against one pass over float32 values of order 1, on tensor cores perhaps in TF32.
            for got, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2, msg=lambda text, op=op: f"{op}: {text}")
    except Exception as error:  # whatever is broken here is the finding
        return Finding(False, what, f"{name}: {type(error).__name__}: {error}".lstrip(": "))
    return Finding(True, what, ", ".join(filter(None, (name, f"{len(outputs)} ops, forward and backward"))))


def _patterns() -> int:
    from fsa_compile import registry

    for pattern in registry.patterns():
        effect = "rewritten" if pattern.rewrites else "recognised and left to the inner compiler"
        print(f"{pattern.name:20} {effect}")
    return 0
