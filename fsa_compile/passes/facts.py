"""What is known of data-dependent indices: the trusted base of every proof about selections.

Few, and each property-tested against torch in ``tests/passes/test_facts.py`` with ties, infinities and NaN:

* an index of a top-k, sort or argsort is within its axis, and two slots of one list hold different indices;
* a block that a top-k (``largest=True``) did not pick does not score higher than one that it picked;
* no block scores higher than the first of a descending sort or argsort;
* an ``exists`` has a witness when it holds, and holds when some term satisfies it;
* a minimum over slots is at most the element in any slot;
* scores made of probabilities lie in a range: `ranges.py`.

All are ground: instantiated at the terms that occur, never quantified.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch.fx import Node

from . import expr as x
from .expr import Expr
from .nodes import argument, axis, op_name, picked, rank
from .ranges import Ranges
from .reader import Mode, Reader
from .smt import closure

_ROUNDS = 4  # nested memberships are rare; deeper ones stay uninterpreted


def ground_facts(r: Reader, formulas: Iterable[Expr], terms: Sequence[Expr]) -> list[Expr]:
    """Facts about every membership and every top-k index that occurs in `formulas`.

    Args:
        r: The reader, which knows the top-k nodes.
        formulas: The goal and its hypotheses.
        terms: Slots at which memberships are introduced.
    """
    memberships: set[Expr] = set()
    picks: dict[str, set[Expr]] = {}
    facts: list[Expr] = []
    loads: set[Expr] = set()

    def scan(es: Iterable[Expr]) -> None:
        for e in es:
            for t in x.walk(e):
                if t.op == "exists":
                    memberships.add(t)
                elif t.op == "load":
                    loads.add(t)
                elif t.op == "apply" and t.args[0] in r.tops:
                    picks.setdefault(t.args[0], set()).add(t)

    scan(formulas)
    done: set[Expr] = set()
    for _ in range(_ROUNDS):
        for e in sorted(memberships - done, key=lambda e: e.id):
            done.add(e)
            new = list(membership_facts(e, terms))
            facts += new
            scan(new)
    minima = [f for m in loads for e in done for f in minimum_facts(r, m, witness(e))]
    facts += minima
    scan(minima)
    for name, atoms in sorted(picks.items()):
        facts += list(pick_facts(r, name, sorted(atoms, key=lambda e: e.id)))
    bound = {e.args[0] for e in memberships}
    return [f for f in facts if not (f.free & bound)]


def witness(e: Expr) -> Expr:
    """The slot at which the membership `e` holds, if it holds at all."""
    v = e.args[0]
    key, args = closure(e)
    return x.apply(("witness", key), args, 0, v.args[1].hi - 1)  # type: ignore[arg-type]


def membership_facts(e: Expr, terms: Sequence[Expr]) -> Iterable[Expr]:
    v, body = e.args
    w = witness(e)
    yield x.implies(e, x.conj(x.substitute(body, {v: w}), x.less(w, v.args[1])))
    for t in terms:
        yield x.implies(x.conj(x.in_range(t, v.args[1]), x.substitute(body, {v: t})), e)


def pick_facts(r: Reader, name: str, atoms: Sequence[Expr]) -> Iterable[Expr]:
    node, d = r.tops[name]
    size = r.shape(node.args[0])[d]
    slots = r.sizes.shape(picked(node))[d]
    for a in atoms:
        yield x.implies(x.in_range(a.args[1][d], slots), x.less(x.poly(a), size))
    for a, b in itertools.combinations(atoms, 2):
        same_row = [x.equal(p, q) for k, (p, q) in enumerate(zip(a.args[1], b.args[1])) if k != d]
        legal = [x.in_range(t.args[1][d], slots) for t in (a, b)]
        same_pick = x.equal(x.poly(a), x.poly(b))
        yield x.implies(x.conj(*same_row, *legal, same_pick), x.equal(a.args[1][d], b.args[1][d]))


def minimum_facts(r: Reader, m: Expr, slot: Expr) -> Iterable[Expr]:
    """If `m` is an element of a minimum over an axis: it is at most the element in `slot`."""
    node = r.nodes.get(m.args[0])
    if node is None:
        return
    reduction = node.args[0] if op_name(node) == "getitem" and node.args[1] == 0 else node
    if not isinstance(reduction, Node) or op_name(reduction) not in ("min", "amin") or len(reduction.args) < 2:
        return
    dims = [reduction.args[1]] if isinstance(reduction.args[1], int) else reduction.args[1]
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:  # min(a, b) is no reduction
        return
    source, keepdim = reduction.args[0], bool(argument(reduction, 2, "keepdim", False))
    d = axis(dims[0], rank(source))
    at = (*m.args[1][:d], slot, *m.args[1][d + keepdim :])
    fits = x.in_range(slot, r.shape(source)[d])
    yield x.implies(fits, x.compare_reals("ge", r.read(source, at, Mode.VALUE), m))


def order_facts(r: Reader, formulas: Iterable[Expr], block: Expr) -> tuple[list[Expr], list[tuple[Expr, Expr]]]:
    """For each top-k in `formulas`: `block` is picked, or does not outrank the first pick. For each descending sort or argsort,
    which holds all blocks and of which the model may read a part: `block` does not outrank the first.

    Args:
        r: The reader.
        formulas: Where top-k indices occur.
        block: A block of interest, usually the query's own.

    Returns:
        The facts, and for each top-k (its first pick, the slot at which `block` would stand).
    """
    facts: list[Expr] = []
    slots: list[tuple[Expr, Expr]] = []
    ranges = Ranges(r, (block, x.ZERO))
    atoms = {t for f in formulas for t in x.walk(f) if t.op == "apply" and t.args[0] in r.tops}
    for atom in sorted(atoms, key=lambda e: e.id):
        node, d = r.tops[atom.args[0]]
        if not _descending(node):
            continue
        source = node.args[0]
        size = r.shape(source)[d]
        width = r.sizes.shape(picked(node))[d]
        if width.lo < 1:
            continue

        def at(e: Expr, atom: Expr = atom, d: int = d) -> tuple[Expr, ...]:
            return (*atom.args[1][:d], e, *atom.args[1][d + 1 :])

        slot = x.var(f"{atom.args[0]}.slot", width)
        first = x.apply(atom.args[0], at(x.ZERO), atom.lo, atom.hi)
        member = x.exists(slot, x.equal(x.apply(atom.args[0], at(slot), atom.lo, atom.hi), block))
        here, best = (r.read(source, at(e), Mode.VALUE) for e in (block, first))
        outranks = x.compare_reals("gt", here, best)
        taken = member if op_name(node) == "topk" else x.FALSE
        facts.append(x.disj(taken, x.negate(outranks), x.negate(x.in_range(block, size))))
        facts += [f for e in (here, best) for f in ranges.facts(e)]
        slots.append((first, witness(member) if member.op == "exists" else x.ZERO))
    return facts, slots


def _descending(node: object) -> bool:
    if op_name(node) == "topk":
        return bool(argument(node, 3, "largest", True))
    return bool(argument(node, 2, "descending", False))
