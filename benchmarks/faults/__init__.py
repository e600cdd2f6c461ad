"""Injection of faults into whole runs; see `benchmarks/faults/__main__.py`."""
