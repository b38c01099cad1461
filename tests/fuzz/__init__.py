"""Random models written in random spellings: see docs/fuzzing.md."""
