"""Figures. `make bench`, or `.venv/bin/python -m bench.run NAME…` after `make build`."""
