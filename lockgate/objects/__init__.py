"""Typed Kubernetes objects: only the fields that the data plane uses."""
