"""The `torch.compile` backend: analyse and rewrite the Dynamo graph, then hand it to the inner compiler.

`fsa` is registered by the entry point ``torch_dynamo_backends: fsa`` and by nothing else: an entry point *and*
`register_backend` make torch fail with ``duplicate name`` on first use. It is one module-level function because Dynamo
compares backends to decide whether compiled code may be shared. This module and `passes/shadow.py` are the only ones that
touch private parts of torch.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import logging
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

import fsa_compile
from fsa_compile import options as options_
from fsa_compile.checked import Check, CheckedCall
from fsa_compile.graph_breaks import describe
from fsa_compile.journal import Journal, Session, Trace
from fsa_compile.options import Options
from fsa_compile.passes import dynamo_graph as dg
from fsa_compile.passes.buffers import Buffers
from fsa_compile.passes.region import Original
from fsa_compile.report import GraphReport, Report

logger = logging.getLogger("fsa_compile")

_journal = Journal()

_CALL_OPS = ("call_function", "call_method", "call_module")


def fsa(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    config_patches: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: replace proven attention by sparse ops, hand the rest to the inner compiler.

    Called by Dynamo; users write ``torch.compile(model, backend="fsa")``.

    Args:
        gm: The graph, which is mutated (the inner compiler takes ownership of it).
        example_inputs: Fake tensors and symbolic integers, one for each placeholder.
        mode: As with Inductor: ``"reduce-overhead"``, ``"max-autotune"``, ...
        options: The keys of `fsa_compile.options.Options`, and Inductor's.
        config_patches: Further Inductor settings, which win over `mode` and `options`.
        **kwargs: Passed on to the inner compiler.

    Returns:
        What the inner compiler returns: a callable of the graph's inputs.

    Raises:
        ValueError: An option or its value is wrong (Dynamo raises it inside a `BackendCompilerFailed`).
    """
    caller = _caller()
    parsed, inductor_options = Options.parse(options, pattern_names=_pattern_names)
    # torch's own wrapper maps the mode and checks the types of Inductor's options.
    patches = torch._TorchCompileInductorWrapper(mode, inductor_options, getattr(caller, "dynamic", None)).config
    patches = {**patches, **(config_patches or {})}

    session = _journal.session(caller)
    trace = _trace()
    buffers: Buffers | None = None
    original: Original | None = None
    notes = list(_graph_break(gm))
    if patches and parsed.inner != "inductor":
        notes.append(f"Inductor's options have no effect with inner={parsed.inner!r}: {', '.join(sorted(patches))}")
    if options_.disabled():
        notes.append("FSA_DISABLE is set: every graph went to the inner compiler untouched")
        graphs: tuple[GraphReport, ...] = (GraphReport(session.begin(trace), nodes=_size(gm)),)
    else:
        original = Original(gm) if parsed.verify else None
        graphs, buffers = _analyse(gm, example_inputs, parsed, name=session.begin(trace), rewrite=True, original=original)
    session.add(trace, graphs, notes)
    _announce(graphs, notes, parsed)
    rewritten = Original(gm) if original is not None and original.all_regions() else None
    compiled = _hand_over(gm, example_inputs, parsed, patches, kwargs)
    if original is not None and rewritten is not None:
        compiled = _verified(compiled, original, rewritten, graphs[0].name, parsed, session)
    if buffers is None or not buffers.relied:
        return compiled

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return _hand_over(graph, inputs, parsed, patches, kwargs)

    return _checked(compiled, buffers, example_inputs, session, inner)


def _reset() -> None:
    """Called by `torch._dynamo.reset()`: Dynamo's frame numbers start again, so reports do too."""
    _journal.forget()


fsa.reset = _reset  # type: ignore[attr-defined]


def last_report() -> Report:
    """The report of the latest top-level compilation: all its graphs, recompilations appended.

    Every call of `torch.compile` is a top-level compilation of its own. Graphs of one model that has graph breaks, and
    graphs compiled later for other shapes, belong to the report of the `torch.compile` call that they run under. When an
    older model recompiles, its whole report is the latest again.

    Returns:
        An empty report if nothing has been compiled with ``backend="fsa"``.
    """
    return _journal.latest()


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="fsa")`` would do with these inputs. Analysis only: nothing is rewritten.

    Runs the model once, eagerly, under the caller's grad mode and autocast, because graph breaks can only be passed by
    running; a function of which Dynamo captures nothing runs once more, to find out why. Buffers, random number generators
    and Dynamo's shape history are put back; compiled code of the model is kept apart. Objects that the model changes from
    outside its buffers (a cache passed as an argument) stay changed.

    Args:
        model: A module or function, compiled or not.
        *args: Its inputs.
        **kwargs: Its inputs.

    Returns:
        The report, in which verdict "rewritten" stands for "would be rewritten", and each graph break is a note.

    Raises:
        Exception: Whatever the model itself raises.
    """
    parsed, _ = Options.parse(None)
    session = Session()

    def analyse(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        trace = _trace()
        graphs, _ = _analyse(gm, example_inputs, parsed, name=session.begin(trace), rewrite=False)
        session.add(trace, graphs, _graph_break(gm))
        return gm.forward

    model = torch._dynamo.eval_frame.innermost_fn(getattr(model, "_orig_mod", model))
    # Where torch has them (not in 2.11), separate caches keep this compilation out of the user's recompile limit.
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    with _undisturbed(model, (args, kwargs)):
        torch.compile(model, backend=analyse, **isolated)(*args, **kwargs)
    report = session.report()
    if report.graphs:
        return report
    with _undisturbed(model, (args, kwargs)):
        note = _why_no_graph(model, args, kwargs, isolated)
    return Report(notes=(*report.notes, note))


def _why_no_graph(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], isolated: dict[str, bool]) -> str:
    """A break inside of a Python loop makes Dynamo give up a function without a word, but not where breaks are forbidden."""
    note = "Dynamo captured no graph"
    if not isinstance(model, types.FunctionType):
        return note
    # Dynamo remembers by its code that it gave up: a copy of the function is new to it.
    code = model.__code__.replace(co_name=f"{model.__code__.co_name}_again")
    again = types.FunctionType(code, model.__globals__, model.__name__, model.__defaults__, model.__closure__)
    again.__kwdefaults__ = model.__kwdefaults__
    graphs: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    try:
        torch.compile(again, backend=count, fullgraph=True, **isolated)(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"{note}: {describe(str(error), getattr(error, 'real_stack', None))}"
    return f"{note}: it breaks inside of a Python loop; with fullgraph=True it does not" if graphs else note


def _analyse(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    name: str,
    rewrite: bool,
    original: Original | None = None,
) -> tuple[tuple[GraphReport, ...], Buffers | None]:
    """Run the passes; a fault of ours leaves the graph as it was and becomes a note, or is raised under `strict`.

    Returns:
        The reports, and which buffers the rewrites rely on.
    """
    before = _fingerprint(gm)
    size = _size(gm)
    try:
        from fsa_compile.passes.pipeline import analyse_and_rewrite

        buffers = Buffers(gm, example_inputs)
        return analyse_and_rewrite(gm, options, name=name, rewrite=rewrite, buffers=buffers, original=original), buffers
    except Exception as error:
        if options.strict:
            raise
        if _fingerprint(gm) != before:
            raise RuntimeError("fsa_compile failed while changing the graph, which must not run now") from error
        logger.warning("internal error, the graph is compiled unchanged", exc_info=True)
        text = f"internal error, the graph is compiled unchanged: {type(error).__name__}: {error}"
        return (GraphReport(name, nodes=size, notes=(text, 'options={"strict": True} raises internal errors')),), None


def _hand_over(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    patches: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> Callable[..., Any]:
    if options.inner != "inductor":
        return torch._dynamo.lookup_backend(options.inner)(gm, example_inputs, **kwargs)
    from torch._inductor import compile_fx, config

    theirs = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    return compile_fx.compile_fx(
        gm, example_inputs, config_patches={**patches, "joint_custom_pre_pass": CacheSalt(theirs)}, **kwargs
    )


def _verified(
    compiled: Callable[..., Any], original: Original, rewritten: Original, name: str, options: Options, session: Session
) -> Callable[..., Any]:
    """`compiled`, which is compared with eager when it is first called."""
    from torch._inductor import config

    from fsa_compile.verify import FirstCall

    rewritten.forget_metadata()
    reproducible = options.inner != "inductor" or config.fallback_random
    return FirstCall(
        compiled, original, rewritten.module, name, reproducible, options.strict, lambda text: session.add(None, (), (text,))
    )


def _checked(
    compiled: Callable[..., Any], buffers: Buffers, example_inputs: Sequence[Any], session: Session, inner: Callable[..., Any]
) -> Callable[..., Any]:
    """`compiled`, which is right only while the buffers that it relies on keep their value, with a check of that."""
    checks = [Check(b.position, b.label, b.content.value, b.tensor) for b in buffers.relied.values()]

    def changed(labels: tuple[str, ...]) -> None:
        text = f"{', '.join(labels)} changed after the compilation, which relied on it: the graph runs as it was written"
        logger.warning(text)
        session.add(None, (), (text,))

    graph = buffers.original
    assert graph is not None

    def as_written(*args: Any) -> Any:
        return graph(*args)

    # Dynamo traces the kept graph again (a graph module that it made it would not: hence the function). Graphs that hold
    # symbolic sizes, calls that take functions, or switches of a mode run as they stand: it may not take those twice.
    symbolic = any(isinstance(t, torch.SymInt) for t in example_inputs)
    special = symbolic or any(dg.is_higher_order(n) or dg.switches_mode(n) for n in graph.graph.nodes)
    original = as_written if special else torch.compile(as_written, backend=inner)
    return CheckedCall(compiled, original, checks, changed)


class CacheSalt(CustomGraphPass):
    """A pass that changes nothing and makes Inductor's and AOTAutograd's caches depend on our kernels' sources.

    Both caches know a custom op by its name alone. Without the salt a new version of a backward formula is not used: a
    cache hit on disk brings the old one, and with it the old gradient.

    Args:
        theirs: The pass that the user had configured in this place (or several), which still runs.
    """

    def __init__(self, theirs: Any = None) -> None:
        self.theirs: tuple[Any, ...] = tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,) if theirs else ()

    def __call__(self, graph: torch.fx.Graph) -> None:
        for custom_pass in self.theirs:
            custom_pass(graph)

    def uuid(self) -> Any | None:
        """The sources' hash with the other passes' ids; None, which turns caching off, if one of those has none."""
        others = [custom_pass.uuid() if isinstance(custom_pass, CustomGraphPass) else None for custom_pass in self.theirs]
        return None if None in others else (kernel_hash(), *others)


@functools.cache
def kernel_hash() -> str:
    """Hash of the kernels' sources, taken once: the code that runs is the code that was imported."""
    return hash_sources(Path(fsa_compile.__file__).parent / "kernels")


def hash_sources(folder: Path) -> str:
    """SHA-256 over the names and contents of all Python files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _caller() -> Any | None:
    """The object that stands for the `torch.compile` call that this graph runs under, if there is one.

    Dynamo tells a backend which frame it compiles but not for whom: a resume function after a graph break is a frame of
    its own, and two models of one class share theirs. `torch.compile` makes one wrapper per call around the backend, and
    that wrapper is on the stack.
    """
    code = torch._TorchCompileWrapper.__call__.__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame.f_locals["self"] if frame is not None else None


def _trace() -> Trace | None:
    trace = torch._guards.CompileContext.current_trace_id()
    if trace is None or trace.compile_id.frame_id is None:
        return None
    return Trace(trace.compile_id.frame_id, trace.compile_id.frame_compile_id, trace.attempt)


def _graph_break(gm: torch.fx.GraphModule) -> Iterator[str]:
    """Why Dynamo ended this graph before the function did, with the user's line."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return
    if "DDPOptimizer" in why.reason:
        yield (
            "DistributedDataParallel's bucketing cuts the graph, perhaps inside an attention region; "
            "torch._dynamo.config.optimize_ddp = False keeps it whole"
        )
        return
    yield f"graph break: {describe(why.reason, why.user_stack)}; attention is not recognised across it"


def _size(gm: torch.fx.GraphModule) -> int:
    return sum(node.op in _CALL_OPS for node in gm.graph.nodes)


def _fingerprint(gm: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    bodies = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    return [(node, node.target, node.args, node.kwargs) for body in bodies for node in body.graph.nodes]


def _pattern_names() -> tuple[str, ...]:
    from fsa_compile import registry

    return registry.names()


def _announce(graphs: tuple[GraphReport, ...], notes: Sequence[str], options: Options) -> None:
    report = Report(graphs, tuple(notes))
    if logger.isEnabledFor(logging.INFO):
        roles = ", ".join(site.role for site in report.sites if site.verdict == "rewritten")
        logger.info(
            "%s: %d of %d attention sites rewritten%s",
            graphs[0].name if graphs else "graph",
            report.rewritten,
            len(report.sites),
            f" ({roles})" if roles else "",
        )
    if options.report != "off":
        from fsa_compile import console

        console.show(report, options.report)


@contextmanager
def _undisturbed(model: Any, inputs: Any) -> Iterator[None]:
    """Put back what running `model` once inside Dynamo changes; see `explain`."""
    owner = getattr(model, "__self__", model)
    modules = list(owner.modules()) if isinstance(owner, torch.nn.Module) else []
    tensors = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    buffers = [(m, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    tensors += [*(b for _, _, b, _ in buffers), *(p for m in modules for p in m.parameters(recurse=False))]
    compiled = {m: m._compiled_call_impl for m in modules if m._compiled_call_impl is not None}
    shapes = torch._dynamo.pgo.get_code_state()
    known_shapes = copy.deepcopy(dict(shapes))
    python_random = random.getstate()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices={t.get_device() for t in tensors if t.is_cuda}))
        try:
            for module in compiled:
                module._compiled_call_impl = None
            yield
        finally:
            for module, call in compiled.items():
                module._compiled_call_impl = call
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)
            shapes.clear()
            shapes.update(known_shapes)
            random.setstate(python_random)
