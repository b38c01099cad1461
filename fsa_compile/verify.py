"""``options={"verify": True}``: the first call of each rewritten graph beside eager, on the user's own data.

Two comparisons, forward and gradients:

* **Each site alone.** The graph runs as the user wrote it. At each replaced region the op gets the very tensors that the region
  gets, so an error names its site, and no rounding elsewhere can hide or excuse it.
* **The whole graph**: what the compiled code returns against the graph as it was, in eager. This covers what lies behind the
  rewrite: code that it removed, and the inner compiler.

The second needs a yardstick. A model that chooses blocks by a top-k is not continuous: rounding that falls another way chooses
another block. So eager also runs with its inputs changed by rounding, and the compiled code may be `SLACK` times as far from
eager as that.

All runs are on copies of the inputs. Nothing of the user's is written to: no gradient, no buffer, no state of a random number
generator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fsa_compile.passes import dynamo_graph as dg
from fsa_compile.passes.region import Original, Region
from fsa_compile.passes.replay import Comparison, distance, Replay

logger = logging.getLogger("fsa_compile")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Norm-wise, per tensor, by the narrowest dtype that is involved. What is compared with is computed in float32 at least. A wrong
key, weight or head shows at 1e-2 and above in float32 and at 1e-1 and above in 16 bits, where rounding alone makes 3e-3."""
REDUCED = {"high": 5e-3, "medium": 3e-2}
"""The same for float32 where `torch.set_float32_matmul_precision` allows products of less."""
SLACK = 8.0
"""How many times as far from eager as rounded inputs the compiled code may be."""
ROUNDING = {torch.float64: 2.0**-46, torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""How much the inputs are changed for that, relatively. In float32 it is 64 times the rounding of one operation, because the
compiled code reorders sums; in 16 bits it is one rounding, since there the model itself rounds after each step."""
TRIALS = 8
"""How often that is done before an error counts."""


class VerificationError(Exception):
    """Compiled code and eager differ at the first call; the message names the site or says that no site is to blame."""


@dataclass(frozen=True)
class _Outcome:
    """What one run gave: tensors by name, None for a gradient that does not exist; and whether it drew random numbers."""

    tensors: dict[str, Tensor | None]
    random: bool


@dataclass
class FirstCall:
    """Compiled code that is compared with eager when it is first called.

    Args:
        compiled: The compiled code.
        original: The graph as it was, with its regions.
        rewritten: The graph after the rewrite, to be run eagerly.
        name: What reports call the graph.
        same_random_numbers: Whether the compiled code draws the random numbers that eager draws.
        strict: Raise what keeps the comparison from running (memory, say). Otherwise it is reported.
        report: Takes a line for the report.
    """

    compiled: Callable[..., Any]
    original: Original | None
    rewritten: GraphModule
    name: str
    same_random_numbers: bool
    strict: bool
    report: Callable[[str], None]
    written: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        assert self.original is not None
        inputs = _placeholders(self.original)
        memories = dg.written_storages(self.original.module.graph.nodes)
        self.written = frozenset(k for k, n in enumerate(inputs) if dg.storage(n) in memories)
        self.original.forget_metadata()

    def __call__(self, *args: Any) -> Any:
        if self.original is not None:
            try:
                text = self._verify(self.original, args)
            except VerificationError:
                raise
            except Exception as error:
                if self.strict:
                    raise
                logger.warning("verification could not run", exc_info=True)
                text = f"not compared with eager: {type(error).__name__}: {error}"
            self.original = None  # and with it the copies of the graph
            self.report(f"{self.name}: {text}")
        return self.compiled(*args)

    def _verify(self, original: Original, args: Sequence[Any]) -> str:
        """The line for the report.

        Raises:
            VerificationError: If something differs.
        """
        with _random_numbers(args) as restart:
            found = list(self._sites(original, args))
            limits = [tolerance(c.dtypes) for _, c in found]
            wrong = [f"{r.name}: {c} (allowed: {limit:.0e})" for (r, c), limit in zip(found, limits) if not c.worst <= limit]
            if wrong:
                raise VerificationError(f"{self.name}: the op is not what the model computes: {'; '.join(wrong)}")
            whole = self._whole_graph(original, args, restart, tolerance({d for _, c in found for d in c.dtypes}))
        worst, site = max((c.worst, r.name) for r, c in found)
        count = "1 site" if len(found) == 1 else f"{len(found)} sites"
        return f"first call compared with eager: {count}, largest error {worst:.1e} ({site}); {whole}"

    def _sites(self, original: Original, args: Sequence[Any]) -> Iterator[tuple[Region, Comparison]]:
        with torch.no_grad():
            yield from _SiteReplay(original).compare([_detached(a) for a in args])

    def _whole_graph(self, original: Original, args: Sequence[Any], restart: Callable[[], bool], allowed: float) -> str:
        def run(function: Callable[..., Any], rounding: float = 0.0, seed: int = 0) -> _Outcome:
            restart()
            tensors = self._run(original, function, args, _Copies(rounding, seed))
            return _Outcome(tensors, random=not restart())

        eager = run(original.module)
        reproducible = self.same_random_numbers or not eager.random
        got = run(self.compiled if reproducible else self.rewritten)
        errors = _errors(got, eager)
        limits = dict.fromkeys(errors, allowed)
        for seed in range(TRIALS):
            if all(e <= limits[name] for name, e in errors.items()):
                break
            rounded = _errors(run(original.module, _rounding(args), seed), eager)
            limits = {name: max(limits[name], SLACK * rounded[name]) for name in limits}
        wrong = [f"{name} is off by {e:.1e} (allowed: {limits[name]:.1e})" for name, e in errors.items() if not e <= limits[name]]
        if wrong:
            sites = ", ".join(r.name for r in original.all_regions())
            again = run(self.rewritten)
            ours = max(_errors(again, eager).values(), default=0.0)
            raise VerificationError(
                f"{self.name}: compiled and eager differ: {'; '.join(wrong)}. Each rewritten site ({sites}) agrees with eager "
                f"on its own, and the rewritten graph, run eagerly, is off by {ours:.1e}. If that is little, the inner compiler "
                "is at fault"
            )
        what = "outputs and gradients" if any(name.startswith("gradient") for name in errors) else "outputs"
        text = f"{what} of the graph within {max(errors.values(), default=0.0):.1e}"
        if not reproducible:
            text += " (rewritten, but run eagerly: the inner compiler draws other random numbers)"
        return text

    def _run(
        self, original: Original, function: Callable[..., Any], args: Sequence[Any], copies: _Copies
    ) -> dict[str, Tensor | None]:
        """One run on copies: outputs, the inputs that are written to, and gradients of a random functional of them."""
        names = [n.name for n in _placeholders(original)]
        leaves = [copies.of(a, k in self.written) for k, a in enumerate(args)]
        # Only what is no leaf may be written to where gradients flow.
        given = [t.clone() if k in self.written and _has_gradient(t) else t for k, t in enumerate(leaves)]
        outputs = tree_leaves(function(*given))
        tensors: dict[str, Tensor | None] = {f"output {k}": t for k, t in enumerate(outputs) if isinstance(t, Tensor)}
        tensors |= {f"input {names[k]} afterwards": given[k] for k in sorted(self.written) if isinstance(given[k], Tensor)}
        results = [t for t in tensors.values() if t is not None and t.requires_grad]
        sources = {names[k]: t for k, t in enumerate(leaves) if _has_gradient(t)}
        if results and sources:
            generator = torch.Generator().manual_seed(0)
            upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in results]
            gradients = torch.autograd.grad(results, list(sources.values()), upstream, allow_unused=True)
            tensors |= {f"gradient of {name}": g for name, g in zip(sources, gradients)}
        return {name: None if t is None else t.detach() for name, t in tensors.items()}


class _SiteReplay(Replay):
    """A replay of the user's own data that also looks into the bodies of checkpoints."""

    def __init__(self, original: Original) -> None:
        super().__init__(original.module, original.regions, exact=False)
        self.original = original
        self.inner: list[tuple[Region, Comparison]] = []

    def compare(self, args: Sequence[Any]) -> Iterator[tuple[Region, Comparison]]:
        """All regions, those of bodies last."""
        yield from self.run(dict(zip(_placeholders(self.original), args)))
        yield from self.inner

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for body in self.original.bodies.values():
            for k, a in enumerate(args):
                if a is body.module:
                    given = args[k + 1 :]
                    self.inner += _SiteReplay(body).compare([_detached(t) for t in given])
                    return body.module(*given)
        return super().call(n, args, kwargs)


class _Copies:
    """Copies of inputs; those that share memory share it afterwards.

    Args:
        rounding: Change floating-point values by up to so much, relatively.
        seed: Of that change.
    """

    def __init__(self, rounding: float, seed: int) -> None:
        self.rounding = rounding
        self.generator = torch.Generator().manual_seed(seed)
        self.storages: dict[int, torch.UntypedStorage] = {}

    def of(self, t: Any, written: bool) -> Any:
        """A copy without history. Parameters that nothing writes to are not copied."""
        if not isinstance(t, Tensor):
            return t
        copy = self._copy(t, written)
        return copy.requires_grad_() if t.requires_grad else copy

    def _copy(self, t: Tensor, written: bool) -> Tensor:
        if self.rounding and t.is_floating_point() and not written:
            noise = torch.rand(t.shape, generator=self.generator).mul_(2).sub_(1).to(t.device)
            return (t.detach() * (1 + self.rounding * noise)).to(t.dtype)
        if isinstance(t, torch.nn.Parameter) and not written:
            return t.detach()
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided:
            return t.detach().clone()
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage.clone()
        empty = torch.empty(0, dtype=t.dtype, device=t.device)
        return empty.set_(self.storages[storage.data_ptr()], t.storage_offset(), t.size(), t.stride())


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """The largest error that rounding explains where these dtypes are involved."""
    found = [TOLERANCE[d] for d in dtypes if d in TOLERANCE]
    if torch.float32 in dtypes:
        found.append(REDUCED.get(torch.get_float32_matmul_precision(), 0.0))
    return max(found)


def _rounding(args: Sequence[Any]) -> float:
    return max((ROUNDING[a.dtype] for a in args if isinstance(a, Tensor) and a.dtype in ROUNDING), default=0.0)


def _errors(got: _Outcome, want: _Outcome) -> dict[str, float]:
    """How far apart two runs are, by tensor. A gradient that does not exist is zero."""
    errors = {}
    for name, b in want.tensors.items():
        a = got.tensors.get(name)
        if a is None or b is None:
            present = a if b is None else b
            errors[name] = float("inf") if present is not None and present.any() else 0.0
        else:
            errors[name] = distance(a, b) if a.shape == b.shape and a.dtype == b.dtype else float("inf")
    return errors


def _placeholders(original: Original) -> list[Node]:
    return [n for n in original.module.graph.nodes if n.op == "placeholder"]


def _has_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def _detached(t: Any) -> Any:
    return t.detach().clone() if isinstance(t, Tensor) else t


@contextmanager
def _random_numbers(args: Iterable[Any]) -> Iterator[Callable[[], bool]]:
    """Puts the generators back at the end; what it gives puts them back in between, and says whether they stood there."""
    devices = sorted({t.get_device() for t in args if isinstance(t, Tensor) and t.is_cuda})

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    start = states()

    def restart() -> bool:
        same = all(torch.equal(a, b) for a, b in zip(states(), start))
        torch.set_rng_state(start[0])
        for device, state in zip(devices, start[1:]):
            torch.cuda.set_rng_state(state, device)
        return same

    try:
        yield restart
    finally:
        restart()
