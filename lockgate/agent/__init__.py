"""State into the kernel: what runs once per node and owns its maps."""
