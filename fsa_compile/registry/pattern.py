"""What a pattern is: one role that attention can play, how to recognise it, prove it and build it.

A pattern never looks at graph nodes. It sees an `AttentionForm`, the normal form of a site in any spelling, proposes
candidates (`match`), has them proven (`check`) and computes the output from canonical tensors (`build`). The built-in
roles in `builtin.py` use nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..passes.expr import Expr
from ..report import Proof, Reason

if TYPE_CHECKING:
    from ..passes.form_view import FormView
    from ..passes.prove import Prover


@dataclass(frozen=True)
class Segment:
    """A run of slots of a block list.

    Attributes:
        entry: The block number in a slot.
        valid: When the slot counts; the op gets -1 otherwise.
        slot: The slot variable, or the constant zero for a single slot.
    """

    entry: Expr
    valid: Expr
    slot: Expr


@dataclass(frozen=True)
class BlockList:
    """A per-query list of key blocks, as data that the rewrite materialises for the op.

    Attributes:
        segments: The parts of the list: one top-k, or several lists whose union is meant.
        block_size: Keys per block.
        order: From a key position in a listed block to when the query sees it.
        per_query_head: Whether each query head has its own list (otherwise one per key/value head).
        index: What the form's key index j is in terms of slots, where the spelling gathers keys or has a map of all blocks.
    """

    segments: tuple[Segment, ...]
    block_size: int
    order: Callable[[Expr], Expr]
    per_query_head: bool
    index: Mapping[Expr, Expr]


@dataclass(frozen=True)
class Candidate:
    """A proposal: "this site is `role` with these parameters", still to be proven.

    Attributes:
        role: Name for the report.
        parameters: What the report shows and `build` reads.
        visible: The op's visibility: from a key position to a formula over the form's b, h and i.
        blocks: The list of blocks, for selections.
        witnesses: Key positions of which one is visible to every query, for the proof that no row is empty.
        terms: Slots at which memberships are instantiated in proofs.
        facts: Ground facts about data-dependent indices that the proofs may use.
    """

    role: str
    parameters: Mapping[str, Any]
    visible: Callable[[Expr], Expr]
    blocks: BlockList | None = None
    witnesses: tuple[Expr, ...] = ()
    terms: tuple[Expr, ...] = ()
    facts: tuple[Expr, ...] = ()

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.role}({inner})"


@dataclass(frozen=True)
class Tensors:
    """What `Pattern.build` computes from: canonical views of the user's own tensors.

    Attributes:
        q: ``(b, hq, n, dk)``, times the temperatures of its logits.
        k: ``(b, hkv, m, dk)``.
        v: ``(b, hkv, m, dv)``.
        scale: What multiplies ``<q, k>``.
        indices: ``(b, hkv or hq, n, t)`` block numbers, for candidates with a block list.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    indices: torch.Tensor | None = None


class Pattern:
    """One role. Subclass it, or see `fsa_compile.registry.register`.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from fsa_compile.registry import Pattern, Candidate
        >>> class CausalToSDPA(Pattern):
        ...     name = "causal_sdpa"
        ...     def match(self, form):
        ...         yield Candidate("causal_sdpa", {}, visible=lambda p: form.causal(p), witnesses=(form.query,))
        ...     def build(self, candidate, t):
        ...         return F.scaled_dot_product_attention(t.q, t.k, t.v, is_causal=True, scale=t.scale, enable_gqa=True)
    """

    name: str = ""
    """What `options={"disable": [...], "only": [...]}` and reports call it."""
    rewrites: bool = True
    """False for a role that is recognised and left to the inner compiler."""

    returns_lse: bool = False
    """Whether `build` returns the log-sum-exp beside the output."""

    def match(self, form: FormView) -> Iterable[Candidate]:
        """Proposes candidates for the site; cheap, by looking at the visibility at a few coordinates.

        Args:
            form: The site's normal form.
        """
        raise NotImplementedError

    def check(self, form: FormView, candidate: Candidate, prover: Prover) -> tuple[Proof, ...]:
        """Proves the candidate for all coordinates.

        Returns:
            The discharged obligations.

        Raises:
            Refusal: With a counterexample where one exists.
        """
        from ..passes.visibility import prove_candidate

        return prove_candidate(form, candidate, prover)

    def supports(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
        """Why the op cannot or should not run here, or None. `profit="always"` asks this too, for what cannot run."""
        return None

    def pays(self, form: FormView, candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Reason | None:
        """Why the op would be slower than the user's code here, or None. Only asked under `profit="auto"`."""
        return None

    def build(self, candidate: Candidate, tensors: Tensors) -> Any:
        """Computes the output with torch functions; called on graph proxies.

        Returns:
            ``out (b, hq, n, dv)``, or ``(out, lse)`` with the natural log-sum-exp ``(b, hq, n)``; without it, sites
            where a query may see no key are refused.
        """
        raise NotImplementedError
