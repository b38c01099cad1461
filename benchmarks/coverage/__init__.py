"""Which spellings and which real models the backend rewrites: what is expected, how they are run, and the page about it.

``python benchmarks/coverage.py`` is the program. `expected` was written before the first run; `pypi` and `public` build the
models, `trial` runs one and compares it with eager, `spellings` does the same for the table of the tests, `page` writes
``docs/coverage.md``.
"""
