"""Events out of the kernel: decoded in bulk, named by the journal, kept as columns."""
