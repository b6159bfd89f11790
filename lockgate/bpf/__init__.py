"""eBPF from Python: system call, loading, schema, maps, rings, links, features."""
