"""Machine code for operations that are slow in torch on a CPU, compiled by numba; without numba, torch computes all."""
