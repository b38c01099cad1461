"""Running a region beside its replacement.

A graph runs once as it is ("base"), and on the way every region's path runs a second time in wide floating point, from its
leaves on. Masks and lists of blocks come from the base run: they are what the model really chooses, with its rounding and its
ties, and the same for both sides. So what is compared is attention alone, and the comparison does not suffer from a top-k that
falls the other way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from ..kernels import reference
from . import dynamo_graph as dg
from .region import attribute, Region

FLOOR = 0.1
"""A gradient is held against its own norm, or this part of the largest gradient's if that is more: the gradient of queries that
see a single key is zero, and rounding is all that is left of it."""

_GRAD_MODES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_TO_REAL = ("half", "bfloat16", "float", "double")


@dataclass(frozen=True)
class Comparison:
    """How far a replacement is from the region that it replaces.

    Attributes:
        errors: Norm of the difference over the norm of what the region gives, for the output and each gradient; infinite
            where one side has NaN or infinity and the other has not.
        dtypes: Of the operands and the output in the model.
        fault: What is wrong apart from the values: a shape, a dtype, an error that the replacement raised.
    """

    errors: Mapping[str, float]
    dtypes: frozenset[torch.dtype]
    fault: str | None = None

    @property
    def worst(self) -> float:
        """The largest error; infinite if something else is wrong."""
        return math.inf if self.fault else max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        return ", ".join(f"{name} off by {e:.1e}" for name, e in self.errors.items())


class Unrunnable(Exception):
    """The original graph could not be run on these data, so nothing was compared."""


class Replay:
    """Runs one graph with the regions in it.

    Args:
        module: The graph, as the user wrote it.
        regions: What to compare on the way.
        exact: Compare in float64 with the op's definition (`kernels/reference.py`) in the place of the op. Otherwise the op
            itself runs in the model's dtype, and the region in float32 (float64 models: float64).
        seed: Of the random cotangents.
    """

    def __init__(self, module: GraphModule, regions: Iterable[Region], *, exact: bool, seed: int = 0) -> None:
        self.module, self.regions, self.exact = module, list(regions), exact
        self._seed = seed

    def run(self, values: Mapping[Node, Any], only: frozenset[Node] | None = None) -> Iterator[tuple[Region, Comparison]]:
        """Compare each region.

        Args:
            values: The inputs, and the values that nodes have instead of what the graph computes.
            only: The nodes to run; by default all.

        Raises:
            Unrunnable: If the graph itself raises.
        """
        nodes = [n for n in self.module.graph.nodes if n.op != "output" and (only is None or n in only)]
        last = _last_uses(nodes, self.regions)
        base: dict[Node, Any] = {}
        runs = [_WidePath(region, self) for region in self.regions]
        for n in nodes:
            base[n] = values[n] if n in values else self._base(n, base)
            for run in runs:
                try:
                    run.step(n, base)
                except Exception as error:
                    raise Unrunnable(f"{n.name} in {run.wide}: {type(error).__name__}: {error}") from error
            for run in [r for r in runs if r.region.output is n]:
                runs.remove(run)
                yield run.region, self._compare(run, base)
            for a in last.get(n, ()):
                base.pop(a, None)

    def _base(self, n: Node, env: Mapping[Node, Any]) -> Any:
        try:
            if n.op == "placeholder":
                raise KeyError(f"no value for input {n.name}")
            if n.op == "get_attr":
                return attribute(self.module, str(n.target))
            args, kwargs = map_arg((n.args, n.kwargs), env.__getitem__)
            return self.call(n, args, kwargs)
        except Exception as error:
            raise Unrunnable(f"{n.name}: {type(error).__name__}: {error}") from error

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one node of the base run. Grad modes are not switched: no gradient is taken of it."""
        if dg.target_name(n) in _GRAD_MODES:
            return None
        if n.op == "call_module":
            return self.module.get_submodule(str(n.target))(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], str(n.target))(*args[1:], **kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def wide(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
        """Run one node in `dtype` instead of what the model casts to; an op of ours as `reference` defines it."""
        if n.op == "call_method" and n.target in _TO_REAL:
            return args[0].to(dtype)
        args, kwargs = map_aggregate((args, kwargs), lambda a: dtype if isinstance(a, torch.dtype) and a.is_floating_point else a)
        namespace, _, name = str(n.target).partition(".")
        definition = getattr(reference, name.removesuffix(".default"), None) if namespace == "fsa" else None
        return Replay.call(self, n, args, kwargs) if definition is None else definition(*args, **kwargs)

    def _compare(self, run: _WidePath, base: Mapping[Node, Any]) -> Comparison:
        region = run.region
        want = run.env[region.output]
        dtypes = frozenset((region.dtype, *(base[n].dtype for n in region.operands)))
        try:
            got = run.replacement(base)
        except Exception as error:
            return Comparison({}, dtypes, f"what replaces it raises {type(error).__name__}: {error}")
        if got.shape != want.shape:
            return Comparison({}, dtypes, f"the output has shape {tuple(want.shape)}, what replaces it {tuple(got.shape)}")
        if not self.exact and got.dtype != base[region.output].dtype:
            return Comparison({}, dtypes, f"the output has dtype {base[region.output].dtype}, what replaces it {got.dtype}")
        errors = {"output": distance(got, want)}
        if region.needs_grad:
            generator = torch.Generator().manual_seed(self._seed)
            cotangent = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(want)
            theirs, ours = run.gradients(want, cotangent), run.gradients(got, cotangent.to(got.dtype))
            floor = FLOOR * max((_norm(g) for g in theirs), default=0.0)
            for leaf, a, b in zip(region.leaves, ours, theirs):
                errors[f"gradient of {leaf.name}"] = distance(a, b, floor)
        return Comparison(errors, dtypes)


class _WidePath:
    """One region's second run, in wide floating point and with gradients."""

    def __init__(self, region: Region, replay: Replay) -> None:
        self.region, self.replay = region, replay
        self.wide = torch.float64 if replay.exact or region.dtype == torch.float64 else torch.float32
        self.env: dict[Node, Any] = {}
        self.leaves: dict[Node, Tensor] = {}

    def step(self, n: Node, base: Mapping[Node, Any]) -> None:
        """Run `n` if it belongs to the path."""
        if n in self.region.leaves:
            self.leaves[n] = base[n].detach().to(self.wide, copy=True).requires_grad_(self.region.needs_grad)
            with torch.set_grad_enabled(self.region.needs_grad):
                self.env[n] = self.leaves[n].clone()  # the model may write into it
        elif n in self.region.memory:
            self.env[n] = base[n].detach().to(self.wide, copy=True)
        elif n in self.region.path:
            args, kwargs = map_arg((n.args, n.kwargs), lambda a: self.env[a] if a in self.env else _widened(base[a], self.wide))
            with _plain(self.region.needs_grad):
                self.env[n] = _absorbed(n, base, self.env, self.replay.wide(n, args, kwargs, self.wide))

    def replacement(self, base: Mapping[Node, Any]) -> Tensor:
        """What the rewrite puts in the place of the output, on the operands of this run."""
        region, exact = self.region, self.replay.exact
        env: dict[Node, Any] = {}
        path: set[Node] = set()  # what follows from the operands
        arguments = iter(region.arguments)
        with _plain(region.needs_grad):
            for n in region.replacement.nodes:
                if n.op == "placeholder":
                    a = next(arguments)
                    if a in region.operands:
                        path.add(n)
                        env[n] = self.env[a] if exact else self.env[a].to(base[a].dtype)
                    else:
                        env[n] = base[a]
                    continue
                args, kwargs = map_arg((n.args, n.kwargs), env.__getitem__)
                if n.op == "output":
                    break
                if exact and any(a in path for a in n.all_input_nodes):
                    path.add(n)
                    env[n] = self.replay.wide(n, args, kwargs, self.wide)
                else:
                    env[n] = self.replay.call(n, args, kwargs)
        return args[0]

    def gradients(self, out: Tensor, cotangent: Tensor) -> list[Tensor]:
        """Of all leaves; zeros where there is none."""
        leaves = list(self.leaves.values())
        if not out.requires_grad:
            return [torch.zeros_like(t) for t in leaves]
        found = torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found)]


def _absorbed(n: Node, base: Mapping[Node, Any], env: Mapping[Node, Any], wide: Any) -> Any:
    """The result `wide` of the call `n`; of ``t + 1e-9`` the elements of t itself where the model's own arithmetic rounds the
    number away. That is what the model computes, and what a floor under a sum may be proven by (`row_sums`)."""
    numbers = [a for a in n.args if isinstance(a, float)]
    if dg.target_name(n) != "add" or len(n.all_input_nodes) != 1 or len(numbers) != 1 or n.kwargs:
        return wide
    (source,) = n.all_input_nodes
    if source not in env or not isinstance(wide, Tensor) or base[source].shape != wide.shape:
        return wide
    return torch.where(base[n] == base[source], env[source], wide)


def distance(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of `want`, or over `floor` if that is more; infinite if NaN stand elsewhere."""
    got, want = got.detach().double(), want.detach().double()
    if not torch.equal(got.isnan(), want.isnan()) or not torch.equal(got.isinf(), want.isinf()):
        return math.inf
    difference = _norm(got.nan_to_num(0.0, 0.0, 0.0) - want.nan_to_num(0.0, 0.0, 0.0))
    return difference / max(_norm(want), floor, 1e-30) if difference else 0.0


def _norm(t: Tensor) -> float:
    return t.detach().double().nan_to_num(0.0, 0.0, 0.0).norm().item()


def _widened(value: Any, wide: torch.dtype) -> Any:
    def widen(t: Any) -> Any:
        return t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t

    return map_aggregate(value, widen)


@contextmanager
def _plain(grad: bool) -> Iterator[None]:
    """Gradients as the region needs them, and no autocast: it would narrow what runs wide."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _last_uses(nodes: Sequence[Node], regions: Iterable[Region]) -> dict[Node, list[Node]]:
    """After which node the base value of each node is not needed any more."""
    needed: dict[Node, Node] = {}
    extra: dict[Node, list[Node]] = {}
    for region in regions:
        extra.setdefault(region.output, []).extend((*region.arguments, *region.operands, region.output))
    for n in nodes:
        for a in (*n.all_input_nodes, *extra.get(n, ()), n):
            needed[a] = n
    out: dict[Node, list[Node]] = {}
    for a, n in needed.items():
        out.setdefault(n, []).append(a)
    return out
