"""The variants that `scripts/benchmark.py` runs against one another."""
