"""Native sparse attention as people write it in plain PyTorch: a table of spellings, each beside its mutants."""
