"""A staged benchmark run on a GPU: `make bench-gpu`, or `python -m benchmarks.gpu` in the root of a checkout."""
