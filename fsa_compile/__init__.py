"""fsa_compile: ``torch.compile(model, backend="fsa")`` for Native Sparse Attention."""
