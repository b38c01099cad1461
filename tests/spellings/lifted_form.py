"""What a spelling was lifted to, as text that only changes when the form does.

Names of nodes and the order of terms depend on torch and on what else ran in the process; here a node is called by its op, and
terms stand in the order of their text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fsa_compile.passes import expr as x
from fsa_compile.passes.attention_form import AttentionForm, Operand
from fsa_compile.passes.classify import Match
from fsa_compile.passes.expr import Expr
from fsa_compile.passes.nodes import op_name
from fsa_compile.passes.reader import Reader
from fsa_compile.passes.rewrite import Rewriter

from .spelling import Spelling

OPTIONS = {"inner": "eager", "profit": "always", "strict": True, "differential": False, "proof_seconds": 60}


def lifted(spelling: Spelling, seed: int) -> str:
    """The forms of all rewritten sites of a spelling, in graph order."""
    found: list[str] = []
    rewrite = Rewriter.rewrite

    def record(self: Rewriter, match: Match, *rest: Any) -> None:
        found.append(describe(match.reader, match))
        rewrite(self, match, *rest)

    function, inputs = spelling.make(seed)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewriter, "rewrite", record)
        torch.compile(function, backend="fsa", fullgraph=True, options=OPTIONS)(*inputs)
    return "\n".join(found)


def describe(r: Reader, match: Match) -> str:
    """One site: role and parameters, the form, what was proven."""
    form = match.form
    sizes = dict(zip(("b", "hq", "n", "dk", "dv"), form.sizes))
    sizes |= {"hkv": x.integer(form.kv_heads), "m": form.keys, "width": form.width}
    lines = {
        "role": str(match.candidate),
        "empty rows": str(match.empty_value),
        "logit": _logit(form),
        **({"factors": _temperatures(form)} if form.temperatures else {}),
        "visible": _parts(form.visible),
        "key": text(form.key),
        "guard": _parts(form.guard),
        "sizes": ", ".join(f"{name} {text(size)}" for name, size in sizes.items()),
        "q": _operand(form.q),
        "k": _operand(form.k),
        "v": _operand(form.v),
        "softmax": form.softmax,
        "output": f"{form.output} {form.output_layout.dims}",
    }
    lines |= {f"proof {k}": f"{p.obligation} ({p.method})" for k, p in enumerate(match.proofs)}
    return _by_op(r, "".join(f"{name:11}{value}\n" for name, value in lines.items()))


def _logit(form: AttentionForm) -> str:
    fills = ", ".join(f"{f:g}" for f in sorted(form.fills))
    rows = ", rows that see nothing give zero" if form.zero_rows else ""
    return f"{form.scale:.6g} * <q, k> where visible, else {'+ ' if form.additive else ''}({fills}){rows}"


def _temperatures(form: AttentionForm) -> str:
    return ", ".join(f"{'1 / ' * t.inverse}{_element(t.node, _argument(t.coords))}" for t in form.temperatures)


def _parts(e: Expr) -> str:
    """A conjunction or disjunction with a line for each of its parts."""
    return f"\n{'':7}{e.op:4}".join(sorted(map(text, e.args))) if e.op in ("and", "or") else text(e)


def _operand(o: Operand) -> str:
    splits = "".join(f" {('groups', 'chunks')[axis - 1]} {size}" for axis, size in o.layout.splits)
    return f"{o.node} {o.layout.dims}{splits} {str(o.dtype).removeprefix('torch.')}"


def _by_op(r: Reader, page: str) -> str:
    """Nodes as ``topk``, ``topk'2``: by op, numbered as they occur."""
    numbers: dict[str, list[str]] = {}

    def rename(name: re.Match[str]) -> str:
        node = r.nodes.get(name[0])
        if node is None or name[0] == "output":
            return name[0]
        op = op_name(node) or "input"
        same = numbers.setdefault(op, [])
        if name[0] not in same:
            same.append(name[0])
        k = same.index(name[0])
        return op if k == 0 else f"{op}'{k + 1}"

    head, *lines = page.splitlines(keepends=True)
    return head + "".join(line[:11] + re.sub(r"\b[a-zA-Z_]\w*\b", rename, line[11:]) for line in lines)


def text(e: Expr) -> str:
    """An expression with its terms in the order of their text, which does not depend on the order in which they were made."""
    op, a = e.op, e.args
    if op == "sum":
        parts = sorted((_times(k, text(t)) for t, k in a[1]), key=lambda part: (part[0] == "-", part))
        parts += [str(a[0])] if a[0] or not parts else []
        return " + ".join(parts).replace("+ -", "- ")
    if op == "eq":
        return f"{min(text(a[0]), text(x.times(a[0], -1)), key=lambda t: (t.count('-'), t))} == 0"
    if op in ("and", "or"):
        return "(" + f" {op} ".join(sorted(map(text, a))) + ")"
    if op == "prod":
        return "*".join(sorted(map(text, a[0])))
    return f"{op}({', '.join(map(_argument, a))})" if op not in _FORMATS else _FORMATS[op](*map(_argument, a))


def _times(k: int, term: str) -> str:
    term = f"({term})" if k not in (1, -1) and " " in term.split("[")[0] else term
    return term if k == 1 else f"-{term}" if k == -1 else f"{k}*{term}"


def _argument(a: Any) -> str:
    if isinstance(a, Expr):
        return text(a)
    return ", ".join(map(_argument, a)) if isinstance(a, tuple) else str(a)


def _grouped(term: str) -> str:
    return term if re.fullmatch(r"[\w.']+", term) else f"({term})"


def _element(name: str, coordinates: str) -> str:
    return f"{name}[{coordinates}]"


_FORMATS: dict[str, Callable[..., str]] = {
    "var": lambda name, size: name,
    "size": lambda name: name,
    "div": lambda n, d: f"{_grouped(n)} // {d}",
    "mod": lambda n, d: f"{_grouped(n)} % {d}",
    "apply": _element,
    "predicate": _element,
    "load": _element,
    "softmax": _element,
    "ge": lambda t: f"{t} >= 0",
    "not": lambda t: f"not {t}",
    "exists": lambda slot, body: f"exists {slot}: {body}",
    "const": lambda c: c,
    "true": lambda: "true",
    "false": lambda: "false",
}
