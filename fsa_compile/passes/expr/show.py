"""Expressions as a person would write them."""

from __future__ import annotations

from typing import Any

from .node import Expr


def show(e: Expr) -> str:
    """`e` as a person would write it."""
    op, a = e.op, e.args
    if op == "sum":
        parts = [f"{'' if k == 1 else '-' if k == -1 else f'{k}*'}{show(t)}" for t, k in a[1]]
        if a[0] or not parts:
            parts.append(str(a[0]))
        text = " + ".join(parts).replace("+ -", "- ")
        return text if len(parts) == 1 else f"({text})"
    if op in ("var", "size"):
        return a[0]
    if op == "prod":
        return "*".join(map(show, a[0]))
    if op == "div":
        return f"{show(a[0])}//{show(a[1])}"
    if op == "mod":
        return f"{show(a[0])}%{show(a[1])}"
    if op in ("apply", "predicate", "load", "softmax"):
        return f"{a[0]}[{', '.join(map(show, a[1]))}]"
    if op == "ge":
        return f"{show(a[0])} >= 0"
    if op == "eq":
        return f"{show(a[0])} == 0"
    if op == "not":
        return f"not ({show(a[0])})"
    if op in ("and", "or"):
        return "(" + f" {op} ".join(map(show, a)) + ")"
    if op in ("if_int", "if_real"):
        return f"({show(a[1])} if {show(a[0])} else {show(a[2])})"
    if op == "const":
        return str(a[0])
    if op == "compare":
        return f"{show(a[1])} {dict(eq='==', gt='>', ge='>=')[a[0]]} {show(a[2])}"

    def inner(x: Any) -> str:
        if isinstance(x, Expr):
            return show(x)
        return "(" + ", ".join(map(inner, x)) + ")" if isinstance(x, tuple) else str(x)

    return f"{op}({', '.join(map(inner, a))})"
