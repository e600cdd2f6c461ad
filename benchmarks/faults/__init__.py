"""A campaign of faults on whole runs; see `benchmarks/faults/__main__.py`."""
