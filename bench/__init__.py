"""Benchmarks of vattention: `python -m bench --help`."""
