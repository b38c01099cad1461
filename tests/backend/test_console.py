"""What a report looks like: whole pictures for the cases that users see most."""

from __future__ import annotations

import io

import pytest

from fsa_compile import console
from fsa_compile.report import Counterexample, GraphReport, Proof, Reason, ReasonKind, Report, Site, Verdict


def selected(layer: int) -> Site:
    return Site(
        "selected",
        Verdict.REWRITTEN,
        "model.py:41",
        parameters={"block_size": 64, "scale": 0.088388347},
        proofs=(Proof("visible == selected/causal", "z3", 1.25 + layer),),
        node=f"matmul_{layer}",
        module=f"layers.{layer}.attn",
    )


WINDOW = Site(
    "sliding_window",
    Verdict.REFUSED,
    "model.py:77",
    Reason(ReasonKind.MASK, "the mask [i - j <= W] is no window", "model.py:70"),
    Counterexample(512, 0, True, "sliding_window(window=512)"),
    module="layers.0.attn",
)
LAYERS = GraphReport("graph 0", nodes=412, sites=(selected(0), WINDOW, selected(1), selected(3)), seconds={"prove": 0.0125})


def test_the_summary_collapses_equal_layers():
    assert console.render(Report((LAYERS,)), "summary", width=100) == """\
fsa_compile: 3 of 4 attention sites rewritten

 role             verdict     where                 what
 ──────────────────────────────────────────────────────────────────────────────────────────────────
 selected x3      rewritten   model.py:41           block_size=64, scale=0.0883883
                              layers.{0-1,3}.attn
 sliding_window   refused     model.py:77           the mask [i - j <= W] is no window
                              layers.0.attn         (model.py:70)
                                                    query 512 would stop seeing key 0 under
                                                    sliding_window(window=512)

"""


def test_full_adds_proofs_kinds_and_times():
    summary = console.render(Report((LAYERS,)), "summary")
    full = console.render(Report((LAYERS,)), "full")
    for line in ("proven: visible == selected/causal (z3, 1.2 ms)", "mask: the mask [i - j <= W]", "412 nodes; prove 12.5 ms"):
        assert line in full and line not in summary


def test_a_narrow_terminal_gets_paragraphs():
    text = console.render(Report((LAYERS,)), "summary", width=44)
    assert text == """\
fsa_compile: 3 of 4 attention sites
rewritten
selected x3 rewritten
  model.py:41
  layers.{0-1,3}.attn
  block_size=64, scale=0.0883883
sliding_window refused
  model.py:77
  layers.0.attn
  the mask [i - j <= W] is no window
  (model.py:70)
  query 512 would stop seeing key 0 under
  sliding_window(window=512)
"""


def test_no_attention_and_notes():
    report = Report((GraphReport("graph 0", nodes=1, notes=("a [bold]note[/bold]",)), LAYERS), notes=("graph break: x",))
    text = console.render(report).splitlines()
    assert text[:4] == [
        "fsa_compile: 3 of 4 attention sites rewritten in 2 graphs",
        "graph 0: no attention found (1 node)",
        "  note: a [bold]note[/bold]",
        "graph 0",
    ]
    assert text[-1] == "  note: graph break: x"
    assert console.render(Report((GraphReport("graph 0", nodes=5),))) == (
        "fsa_compile: no attention found in 1 graph\ngraph 0: no attention found (5 nodes)\n"
    )
    assert console.render(Report()) == "fsa_compile: no graphs\n"


@pytest.mark.parametrize(
    "names, merged",
    [
        (["layers.0.attn"], "layers.0.attn"),
        (["layers.0.attn", "layers.0.attn"], "layers.0.attn"),
        (["l.0.a", "l.1.a", "l.2.a", "l.7.a", "l.10.a", "l.11.a"], "l.{0-2,7,10-11}.a"),
        (["enc.0.attn", "dec.0.attn", "dec.1.attn"], "enc.0.attn and 2 more"),
        (["l.0.h.0", "l.1.h.1"], "l.0.h.0 and 1 more"),
        (["", ""], ""),
    ],
)
def test_module_names_are_merged(names, merged):
    assert console._merge_names(names) == merged


def test_sites_that_differ_in_anything_that_matters_stay_apart():
    other = Site("selected", Verdict.REWRITTEN, "model.py:41", parameters={"block_size": 32})
    text = console.render(Report((GraphReport("graph 0", sites=(selected(0), selected(1), other)),)))
    assert "selected x2 " in text and "block_size=64" in text and "block_size=32" in text


class Stream(io.StringIO):
    def __init__(self, tty, encoding="utf-8"):
        super().__init__()
        self._tty, self._encoding = tty, encoding

    def isatty(self):
        return self._tty

    @property
    def encoding(self):
        return self._encoding

    def write(self, text):
        text.encode(self._encoding)  # raises as a real stream does
        return super().write(text)


@pytest.mark.parametrize("tty", [True, False])
def test_colour_only_on_a_terminal(monkeypatch, tty):
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    stream = Stream(tty)
    console.show(Report((LAYERS,)), "summary", stream)
    assert "rewritten" in stream.getvalue() and ("\x1b[" in stream.getvalue()) is tty


def test_a_stream_that_cannot_write_the_text_is_no_error():
    stream = Stream(tty=False, encoding="ascii")
    site = Site("unknown", Verdict.REFUSED, "modèle.py:3", Reason(ReasonKind.LOGITS, "β ≠ 1"))
    console.show(Report((GraphReport("graph 0", sites=(site,)),)), "full", stream)
    assert "mod?le.py:3" in stream.getvalue()


def test_no_stderr_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    console.show(Report((LAYERS,)))


def test_a_report_prints_as_its_full_text():
    report = Report((LAYERS,))
    assert str(report) == console.render(report, "full")


@pytest.mark.parametrize("source, shown", [("model.py:70", "too small (model.py:70)\n"), ("model.py:77", "too small\n")])
def test_a_reasons_line_is_shown_unless_it_is_the_sites(source, shown):
    site = Site("causal", Verdict.LEFT, "model.py:77", Reason(ReasonKind.UNPROFITABLE, "too small", source))
    assert shown in console.render(Report((GraphReport("graph 0", sites=(site,)),)))
