"""Lockgate: a Kubernetes data plane in the kernel, driven from Python."""

__version__ = "0.1.0"
