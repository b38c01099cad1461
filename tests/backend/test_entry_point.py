"""The package from outside: found by torch without an import, and light to import."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

import fsa_compile


def run(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", dedent(code)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_finds_the_backend_without_an_import(tmp_path):
    code = """
        import sys, torch
        assert "fsa" in torch._dynamo.list_backends()
        assert not any(name.startswith("fsa_compile") for name in sys.modules)
        compiled = torch.compile(lambda x: x.sin(), backend="fsa", options={"inner": "eager"})
        x = torch.ones(3)
        assert torch.equal(compiled(x), x.sin())
        import fsa_compile
        # By name after the import, and by function: neither may register the name twice.
        for backend in (fsa_compile.backend.fsa, "fsa"):
            assert torch.equal(torch.compile(lambda x: x.cos(), backend=backend, options={"inner": "eager"})(x), x.cos())
        print(len(fsa_compile.last_report().graphs))
    """
    assert run(code, tmp_path) == "1"


def test_importing_first_does_not_disturb_the_registration(tmp_path):
    code = """
        import fsa_compile, torch
        fsa_compile.last_report()
        x = torch.ones(3)
        print(torch.equal(torch.compile(lambda x: x.sin(), backend="fsa", options={"inner": "eager"})(x), x.sin()))
    """
    assert run(code, tmp_path) == "True"


def test_the_import_is_light(tmp_path):
    code = """
        import sys, fsa_compile
        print([name for name in ("torch", "triton", "rich", "z3", "numpy") if name in sys.modules])
    """
    assert run(code, tmp_path) == "[]"


def test_the_public_names():
    assert set(fsa_compile.__all__) <= set(dir(fsa_compile))
    assert fsa_compile.last_report.__module__ == "fsa_compile.backend"
    with pytest.raises(AttributeError, match="has no attribute 'last_reprot'"):
        fsa_compile.last_reprot
