"""What one compilation did: plain frozen data, no tensors, no graph nodes.

A `Report` outlives the graphs it describes (`compile_fx` owns and destroys those), so everything here is strings and
numbers. `fsa_compile.last_report()` and `fsa_compile.explain()` hand it out; `console.py` draws it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any


class Verdict(str, enum.Enum):
    """What happened to an attention site."""

    REWRITTEN = "rewritten"
    """Replaced by an op; every obligation was proven."""
    REFUSED = "refused"
    """Not proven, not legal or not profitable: the user's code runs unchanged and `Site.reason` says why."""
    LEFT = "left"
    """Understood, and no op of ours is meant for it (full or causal attention): Inductor compiles it."""

    def __str__(self) -> str:
        return self.value


class ReasonKind(str, enum.Enum):
    """Why a site was not rewritten. Stable: tools may switch on it."""

    NOT_ATTENTION = "not_attention"
    """The softmax is not between two contractions of the attention form."""
    NOT_SPARSE = "not_sparse"
    """Full or causal attention: the inner compiler has kernels for it."""
    LOGITS = "logits"
    """The logits are not scale * <q, k> with a mask (a bias, a soft cap, several products)."""
    MASK = "mask"
    """The visibility is none of the known rules; see `Site.counterexample`."""
    RUNTIME_MASK = "runtime_mask"
    """The mask holds values that are unknown when compiling (padding, packed documents, an argument), or no known rule."""
    FILL = "fill"
    """Masked logits get a finite value that leaks probability."""
    OPERANDS = "operands"
    """Keys and values do not come from one place in one order."""
    HEAD_MAP = "head_map"
    """Query heads are not grouped onto key/value heads as `h // G`."""
    SOFTMAX_AXIS = "softmax_axis"
    """The softmax does not run over the keys."""
    DUPLICATES = "duplicates"
    """A key may be gathered twice; the op counts it once."""
    EMPTY_ROWS = "empty_rows"
    """A query may see no key, and the op's value for such a row is not the model's."""
    DROPOUT = "dropout"
    """Dropout with p > 0 on the probabilities."""
    GRADIENT = "gradient"
    """Same forward, other gradient (detach, no-grad, straight-through, a factor the op would drop)."""
    MUTATION = "mutation"
    """A tensor of the region is written in place between its use and the place of the op."""
    UNDECIDED = "undecided"
    """The solver ran out of time."""
    SHAPE = "shape"
    """Sizes the op does not take."""
    DTYPE = "dtype"
    """A dtype the op does not take."""
    DEVICE = "device"
    """A device without a kernel."""
    UNPROFITABLE = "unprofitable"
    """`profit="auto"` expects the op to be slower here."""
    TOKEN_LEVEL = "token_level"
    """A top-k over single tokens (DeepSeek sparse attention): no block structure."""
    UNROLLED_LOOP = "unrolled_loop"
    """A Python loop over queries or heads, unrolled by Dynamo: vectorise it."""
    SCORES = "scores"
    """Of a selection: blocks are not ranked by a rule of the op, so the model's own scores and top-k stay."""
    DIFFERENTIAL = "differential"
    """Proven, and yet not what the model computes on made-up data (`options={"differential": True}`): a fault of fsa_compile."""
    INTERNAL = "internal"
    """A fault of fsa_compile; the graph is untouched. `options={"strict": True}` raises it."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Reason:
    """Why a site was refused or left: a stable kind and one sentence for the user.

    Args:
        kind: What class of obstacle it is.
        text: One sentence in the user's terms.
        source: ``"file.py:41"`` of the line that is in the way, where known.
    """

    kind: ReasonKind
    text: str
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text


@dataclass(frozen=True)
class Counterexample:
    """One query and one key at which the model and the nearest op disagree.

    Args:
        query: Query position.
        key: Key position.
        model_sees: Whether the model lets the query see the key.
        op: The rule it was compared with, for example ``"sliding_window(window=512)"``.
        head: Query head, where the rule depends on it.
        batch: Batch row, where the rule depends on it.
    """

    query: int
    key: int
    model_sees: bool
    op: str
    head: int = 0
    batch: int = 0

    def __str__(self) -> str:
        verb = "would stop seeing" if self.model_sees else "would start seeing"
        return f"query {self.query} {verb} key {self.key} under {self.op}"


@dataclass(frozen=True)
class Proof:
    """One discharged obligation.

    Args:
        obligation: What was proven, for example ``"visible == selected/causal"``.
        method: ``"identity"`` (equal normal forms) or ``"z3"``.
        milliseconds: Time of the query.
    """

    obligation: str
    method: str
    milliseconds: float


@dataclass(frozen=True)
class DataCheck:
    """One comparison of a rewritten site with the user's code, on data.

    Args:
        kind: ``"differential"``.
        error: The largest error of the output and of any gradient: norm of the difference over the norm. None if the
            comparison did not run.
        text: What was compared, or why nothing was.
    """

    kind: str
    error: float | None
    text: str


@dataclass(frozen=True)
class Selection:
    """What becomes of the scores and the top-k that choose the blocks of a selected site.

    Args:
        fused: Whether `fsa::select_blocks` took their place; otherwise the model's own list is used.
        reason: Why not.
        parameters: ``kernel_size``, ``block_size``, ``top_k``, ``n_init``, ``n_local`` of the op.
        proofs: The discharged obligations.
        checks: Comparisons on data, where they were asked for.
    """

    fused: bool
    reason: Reason | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    proofs: tuple[Proof, ...] = ()
    checks: tuple[DataCheck, ...] = ()

    def keep(self, reason: Reason) -> Selection:
        """The same, with the model's own list for `reason`."""
        return replace(self, fused=False, reason=reason)


@dataclass(frozen=True)
class Site:
    """One attention site: a softmax between two contractions.

    Args:
        role: ``"selected"``, ``"compressed"``, ``"sliding_window"``, ``"causal"``, ``"full"``, ``"unknown"`` or the name of a
            user's pattern.
        verdict: What happened.
        source: ``"file.py:41"`` of the user's line, or ``"?"``.
        reason: Why not, unless rewritten.
        counterexample: Where the nearest rule differs, when a proof failed.
        parameters: What was found: window, block size, stride, scale, sizes, ...
        proofs: The discharged obligations.
        checks: Comparisons on data, where they were asked for.
        selection: Of a selected site that is rewritten: what chooses the blocks.
        node: Name of the site's last node in the Dynamo graph.
        module: Path of the ``nn.Module`` it stands in, for example ``"layers.3.attn"``.
    """

    role: str
    verdict: Verdict
    source: str
    reason: Reason | None = None
    counterexample: Counterexample | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    proofs: tuple[Proof, ...] = ()
    checks: tuple[DataCheck, ...] = ()
    selection: Selection | None = None
    node: str = ""
    module: str = ""

    def refuse(self, reason: Reason) -> Site:
        """The same site with verdict "refused" for `reason`."""
        return replace(self, verdict=Verdict.REFUSED, reason=reason)


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo handed over.

    Args:
        name: ``"graph 0"``, and for nested bodies ``"graph 0 / wrap_body_0"``.
        nodes: Number of call nodes before the rewrite.
        sites: The attention sites, in graph order.
        notes: Lines for the user that belong to no site.
        seconds: Time per stage: ``shadow``, ``lift and prove``, ``rewrite``.
    """

    name: str
    nodes: int = 0
    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything one top-level compilation did, recompilations appended.

    Args:
        graphs: One entry per graph, in order of compilation.
        notes: Lines that belong to no graph (graph breaks, disabled by environment, ...).
    """

    graphs: tuple[GraphReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of all graphs."""
        return tuple(s for g in self.graphs for s in g.sites)

    @property
    def rewritten(self) -> int:
        """How many sites now run on an op."""
        return sum(s.verdict is Verdict.REWRITTEN for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers: what `to_json` writes and `json.loads` reads back."""
        return {"rewritten": self.rewritten, **_plain(self)}

    def to_json(self, **kwargs: Any) -> str:
        """`to_dict` as JSON; keyword arguments go to `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    def __str__(self) -> str:
        """The table that ``options={"report": "full"}`` prints, without colour."""
        from fsa_compile import console

        return console.render(self, "full")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
