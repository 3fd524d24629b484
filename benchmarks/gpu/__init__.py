"""One staged run on a borrowed GPU: `make bench-gpu`, or `python -m benchmarks.gpu` from the root of a checkout."""
