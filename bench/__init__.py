"""Benchmarks: one module per figure or table. `python -m bench NAME [--quick] [--json FILE]`."""
