"""Whether a top-k picks the blocks that `fsa::select_blocks` picks: then score and top-k are replaced too.

Taking the user's list is always right and always slow: the scores are a tensor of queries times compressed keys. The op
computes them again from the log-sum-exps of the compressed branch, a tile at a time. A list may be replaced by the op's if both
hold the same blocks wherever that reaches the output, in real arithmetic:

* **Scores.** What is ranked, read at (batch, key/value head, query, block), is a positive multiple of the sum, over the query
  heads of the group and the compressed keys, of the probabilities of one compressed branch times the overlap of key and block
  (equation 9 of the NSA paper).
* **Cases.** It is a constant above every such sum exactly for the first and the last few blocks up to the query's own (these are
  forced), and at most zero only for blocks that begin after the query. A block that is added to the list behind the top-k, and
  has such a low score in it, is forced too.
* **Ties.** Every other block up to the query's own overlaps a compressed key that the query sees, so its score is positive; a
  block after the query's overlaps none, so its score is zero. Zeros tie among themselves only, and under the rule "causal" the
  query sees nothing of these blocks, picked or not. Positive scores tie on a set of measure zero.
* **Room.** The forced blocks fit into the list.

The rule "max" of MiniMax-M3 ranks blocks by the largest logit of their tokens up to the query, of an indexer with queries and
keys of its own: there a block after the query scores -inf, and every other block has a finite score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from ...report import Proof
from .. import expr as x
from ..attention_form import Operand
from ..classify import Match
from ..prove import Prover
from ..reader import Reader
from ..refusal import Refusal
from .maximum import ByMaximum
from .probability import ByProbability
from .question import Question


@dataclass(frozen=True)
class Ranking:
    """A top-k that ranks as an op does.

    Attributes:
        block_size, top_k, n_init, n_local: As in `reference.select_blocks`.
        proofs: The discharged obligations.
    """

    block_size: int
    top_k: int
    n_init: int
    n_local: int
    proofs: tuple[Proof, ...]

    def parameters(self) -> dict[str, int | str]:
        """What the report shows."""
        return {name: getattr(self, name) for name in ("block_size", "top_k", "n_init", "n_local")}


@dataclass(frozen=True)
class ProbabilityRanking(Ranking):
    """`fsa::select_blocks`.

    Attributes:
        compressed: Name of the softmax node of the branch whose probabilities it sums.
        kernel_size: Tokens of a compressed key.
    """

    compressed: str
    kernel_size: int

    def parameters(self) -> dict[str, int | str]:
        return {"by": "probability", "kernel_size": self.kernel_size, **super().parameters()}


@dataclass(frozen=True)
class MaximumRanking(Ranking):
    """`fsa::select_blocks_by_max`.

    Attributes:
        q, k: The operands of the logits.
        heads: ``(hq, hkv)`` of them.
    """

    q: Operand
    k: Operand
    heads: tuple[int, int]

    def parameters(self) -> dict[str, int | str]:
        return {"by": "max", **super().parameters()}


def ranking(
    r: Reader, selected: Match, branches: Mapping[str, Match], prover: Prover, replaceable: frozenset[Node]
) -> ProbabilityRanking | MaximumRanking:
    """Prove that the list of a selected branch is what an op returns, as far as the output can tell.

    Args:
        r: Reader of the shadow graph.
        selected: The selected branch.
        branches: The branches that are rewritten, by the name of their softmax.
        prover: Proves, within the graph's budget.
        replaceable: Shadow nodes that stand for a node of the Dynamo graph.

    Raises:
        Refusal: If it is not, or not provably.
    """
    q = Question(r, selected, prover)
    try:
        by_probability = ByProbability(q, branches)
    except Refusal as refusal:
        if any(e.op == "softmax" for _, leaf in q.scores for e in x.walk(leaf)):
            raise
        return _by_maximum(q, replaceable, refusal)
    top_k, n_init, n_local, forced = q.forced(by_probability.cases)
    kernel_size = by_probability.kernel_size(forced)
    softmax = by_probability.branch.form.softmax
    return ProbabilityRanking(q.block_size, top_k, n_init, n_local, tuple(q.proofs), softmax, kernel_size)


def _by_maximum(q: Question, replaceable: frozenset[Node], otherwise: Refusal) -> MaximumRanking:
    if not any(e.op == "load" for _, e in q.scores):
        raise otherwise
    by_maximum = ByMaximum(q)
    top_k, n_init, n_local, _ = q.forced(by_maximum.cases)
    q_node, k_node, kv_heads = by_maximum.operands(replaceable)
    heads = q.form.kv_heads, kv_heads
    return MaximumRanking(q.block_size, top_k, n_init, n_local, tuple(q.proofs), q_node, k_node, heads)
