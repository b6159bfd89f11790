"""Builds Lockgate's container image without a container daemon: `python -m scripts.image`."""
