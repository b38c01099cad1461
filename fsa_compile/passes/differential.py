"""A check of each rewritten region on made-up data, in float64, forward and gradients.

Proofs are about forms; this is about numbers. The region is cut from the graph at its operands and run beside what replaces
it, the op computed as `kernels/reference.py` defines it. q, k and v are random; what chooses keys (scores, a top-k, lists of
blocks that are arguments) is the model's own code on random inputs.

The sizes are the model's own. A static graph has them in its constants, and nothing tells which constant is a length, so such a
region cannot be made smaller: above `ELEMENTS` it is not run, and the report says so. Dynamic sizes are halved, as far as
Dynamo's guards allow, until the region is small enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from ..options import Options
from ..report import DataCheck, ReasonKind, Site
from . import dynamo_graph as dg
from .buffers import Buffers
from .classify import Match
from .legality import Placement
from .refusal import Refusal
from .region import is_root, Original, Region
from .replay import Comparison, Replay, Unrunnable

ELEMENTS = 2**24
"""The largest tensor that is made: 128 MiB in float64, of which a region has about ten."""
TOLERANCE = 1e-9
"""Norm-wise. Float64 sums over 10,000 keys round at 1e-14; the smallest error of a wrong rewrite is a single key in a row of
10,000, and that is 1e-4."""


class Mismatch(Refusal):
    """A region and its replacement differ: a proof, a rule or a pattern is wrong."""


class SecondLine:
    """Called with what a rewrite is about to put into the graph: cuts the region out, and checks it if that is asked for.

    Args:
        original: The graph as it was; it learns of the region.
        site: What is rewritten.
        match: What was proven about it.
        placement: Where it is.
        options: Whether to check.
        replaced: What earlier rewrites of the graph have replaced.
        known: The values of inputs that are buffers, by their nodes in the copy.
        verified: Whether the region is kept for a comparison on the user's data. There a selection may differ from the model's
            where scores are equal up to rounding; on made-up data in float64 it may not.

    Attributes:
        checks: What was checked.
    """

    def __init__(
        self,
        original: Original,
        site: Site,
        match: Match,
        placement: Placement,
        options: Options,
        replaced: Mapping[Node, Node],
        known: Mapping[Node, Tensor],
        verified: bool = True,
    ) -> None:
        self.original, self.site, self.match, self.placement = original, site, match, placement
        self.options, self.replaced, self.known, self.verified = options, replaced, known, verified
        self.checks: list[DataCheck] = []

    def __call__(self, emitted: Sequence[Node], result: Node) -> None:
        name = f"{self.site.role} at {self.site.source}" + (f" ({self.site.module})" if self.site.module else "")
        region = self.original.cut(name, self.placement, emitted, result, self.replaced, chooses=not self.verified)
        if self.options.differential:
            self.checks.append(check(self.original, region, self.match, self.known))
        if self.verified:
            self.original.regions.append(region)


def known_values(original: Original, gm: GraphModule, buffers: Buffers) -> dict[Node, Tensor]:
    """The values of the inputs of a graph that are buffers: a proof may rely on them. By their nodes in the copy."""
    inputs = ((n, buffers.of(n)) for n in gm.graph.nodes if n.op == "placeholder")
    return {original.copy_of(n): b.tensor for n, b in inputs if b is not None}


def check(original: Original, region: Region, match: Match, known: Mapping[Node, Tensor]) -> DataCheck:
    """Compare a region with its replacement on made-up data.

    Args:
        original: The graph as it was.
        region: A region of it.
        match: What was proven about it.
        known: The values of inputs that the proof relies on, by their nodes in the copy.

    Returns:
        The errors, or why it could not be run.

    Raises:
        Mismatch: If they differ.
    """
    start = time.perf_counter()
    sizes = _Sizes(region)
    if sizes.decided_by_data:
        return DataCheck("differential", None, "not run: data decide a size")
    if not sizes.shrink(ELEMENTS):
        return DataCheck("differential", None, f"not run: {sizes.largest()} elements in one tensor, and the sizes are fixed")
    problem = ""
    for lists in _ranges(region, match, sizes):
        try:
            comparison = _compare(original, region, _Values(original, region, sizes, lists, known))
        except Unrunnable as error:
            problem = str(error)
            continue
        if not comparison.worst <= TOLERANCE:
            raise Mismatch(
                ReasonKind.DIFFERENTIAL,
                f"{region.name}: in float64 on made-up data the op is not what the model computes: {comparison}",
            )
        milliseconds = 1000 * (time.perf_counter() - start)
        return DataCheck("differential", comparison.worst, f"float64 on made-up data, {milliseconds:.0f} ms")
    return DataCheck("differential", None, f"not run: the region does not run on made-up data: {problem}")


def _compare(original: Original, region: Region, values: _Values) -> Comparison:
    replay = _OnTheCPU(original.module, [region], exact=True)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        ((_, comparison),) = replay.run(values.all(), region.needed)
    return comparison


class _OnTheCPU(Replay):
    """A replay of made-up data: on the CPU, and without autocast, whose casts at contractions are made explicitly."""

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if dg.switches_mode(n):
            return None
        if n.op == "call_method" and n.target == "cuda":
            return args[0]
        recorded = dg.value(n)
        if dg.target_name(n) in dg.CONTRACTIONS and isinstance(recorded, Tensor):
            args, kwargs = tree_map(lambda a: _cast(a, recorded.dtype), (args, kwargs))
        args, kwargs = map_aggregate((args, kwargs), _on_the_cpu)
        return super().call(n, args, kwargs)

    def wide(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
        if n.op == "call_method" and n.target == "cuda":
            return args[0]
        args, kwargs = map_aggregate((args, kwargs), _on_the_cpu)
        return super().wide(n, args, kwargs, dtype)


def _cast(a: Any, dtype: torch.dtype) -> Any:
    return a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and dtype.is_floating_point else a


def _on_the_cpu(a: Any) -> Any:
    if isinstance(a, torch.device) or isinstance(a, str) and a.split(":")[0] == "cuda":
        return torch.device("cpu")
    return a


def _ranges(region: Region, match: Match, sizes: _Sizes) -> Iterator[tuple[int, int]]:
    """What whole numbers that come from outside may be: block numbers, with padding and beyond the end if the model takes it."""
    blocks = 2
    if match.candidate.blocks is not None:
        keys = max(sizes.of(s) for a in region.operands for s in _shape(a))
        blocks = max(-(-keys // match.candidate.blocks.block_size), 1)
    roots = [dg.value(n) for n in region.needed if is_root(n)]
    if any(isinstance(t, Tensor) and not t.is_floating_point() and t.dtype != torch.bool for t in roots):
        yield -1, blocks + 1
        yield -1, blocks
    yield 0, blocks


def _shape(n: Node) -> Sequence[Any]:
    value = dg.value(n)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


READS = ("item", "tolist", "nonzero", "masked_select")
"""Calls that make sizes out of data."""


class _Sizes:
    """Numbers for the sizes of a region."""

    def __init__(self, region: Region) -> None:
        self._tensors = [dg.value(n) for n in region.needed if isinstance(dg.value(n), Tensor)]
        dynamic = [s for t in self._tensors for s in t.shape if isinstance(s, torch.SymInt)]  # type: ignore[union-attr]
        self._env = dynamic[0].node.shape_env if dynamic else None
        symbols = {f for s in dynamic for f in s.node.expr.free_symbols}
        hints = getattr(self._env, "backed_var_to_val", getattr(self._env, "var_to_val", {}))
        self.decided_by_data = not symbols <= set(hints) or any(dg.target_name(n) in READS for n in region.needed)
        self._values = {f: int(hints[f]) for f in symbols & set(hints)}

    def of(self, size: Any) -> int:
        """A size as a number."""
        return int(size.node.expr.xreplace(self._values)) if isinstance(size, torch.SymInt) else int(size)

    def largest(self) -> int:
        """The number of elements of the largest tensor."""
        return max((self._count(t) for t in self._tensors), default=0)

    def _count(self, t: Any) -> int:
        n = 1
        for s in t.shape:
            n *= self.of(s)
        return n

    def shrink(self, elements: int) -> bool:
        """Make dynamic sizes smaller until no tensor is larger than `elements`; whether that was possible."""
        while self.largest() > elements:
            for f in sorted(self._values, key=lambda f: (-self._values[f], str(f))):
                before = self._values[f]
                self._values[f] = before // 2
                if before >= 4 and self._guarded():
                    break
                self._values[f] = before
            else:
                return False
        return True

    def _guarded(self) -> bool:
        """Whether the sizes satisfy everything that Dynamo has found out about them."""
        return all(g.expr.xreplace(self._values) != False for g in self._env.guards)  # noqa: E712  (a sympy truth value)


class _Values:
    """Made-up values for the inputs of a region and for its leaves."""

    def __init__(
        self, original: Original, region: Region, sizes: _Sizes, lists: tuple[int, int], known: Mapping[Node, Tensor]
    ) -> None:
        self.original, self.region, self.sizes, self.lists, self.known = original, region, sizes, lists, known
        self.generator = torch.Generator().manual_seed(0)

    def all(self) -> dict[Node, Any]:
        """By node."""
        order = [n for n in self.original.module.graph.nodes if n in self.region.needed]
        return {n: v for n in order for v in self._of(n)}

    def _of(self, n: Node) -> Iterator[Any]:
        if n in self.known and n not in self.region.leaves:
            yield self.known[n].detach().cpu()
        elif n in self.region.leaves or is_root(n) and n.op != "get_attr":
            yield map_aggregate(dg.value(n), self._made_up)
        elif n.op == "get_attr":
            value = self.original.attribute(str(n.target))
            yield value.detach().cpu() if isinstance(value, Tensor) else value

    def _made_up(self, t: Any) -> Any:
        if isinstance(t, torch.SymInt):
            return self.sizes.of(t)
        if not isinstance(t, Tensor):
            return t
        shape, strides = [self.sizes.of(s) for s in t.shape], [self.sizes.of(s) for s in t.stride()]
        # In the order of the strides, so that the views that the model takes exist.
        order = sorted(range(len(shape)), key=lambda d: -strides[d])
        return self._draw([shape[d] for d in order], t.dtype).permute([order.index(d) for d in range(len(shape))])

    def _draw(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.5
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=self.generator).to(dtype)
        low, high = self.lists
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)
