"""Settings that must be made before torch is loaded: waiting of OpenMP threads, oneDNN's cache, CUDA's allocator.

The threads of a matrix product wait for each other at its end. GNU's OpenMP lets an early thread spin for some
milliseconds before it sleeps, which is right on an otherwise idle machine. But if another program, or the server's own
event loop, uses a core, the early thread spins on the core that the late thread needs, hundreds of times per step.
Beside one busy program, two cores gave a third of the tokens that they give with short spinning
(`benchmarks/RESULTS.md`); on an idle machine, short spinning has no measurable cost.

oneDNN generates and caches code for every number of rows of a product. Steps are padded to few numbers
(`engine/fast/row_buckets.py`), whose code for one model fits in the cache below. A model whose layers are not packed
has many numbers; with a quarter of the default capacity it soon grows by a fifth of a gigabyte, and then no more.

torch's allocator for CUDA divides segments of fixed size into blocks, and free blocks in different segments cannot
serve one larger request. Expandable segments grow and shrink by pages, so free memory stays usable for requests of any
size.
"""

import os

SPIN_COUNT = "3000"
"""Iterations of the waiting loop, about ten nanoseconds each."""

KEPT_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "320", "LRU_CACHE_CAPACITY": "320"}
"""Capacity of the code caches of oneDNN and of torch's layer above it."""

ALLOCATOR = "expandable_segments:True"

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of the same setting, newest first."""

OF_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables with which a user configures how threads wait."""


def share_cores() -> None:
    """Let waiting threads sleep soon; must be called before torch is imported."""
    if not any(name in os.environ for name in OF_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def bound_primitives() -> None:
    """Reduce oneDNN's code cache, unless the user has set its size; must be called before torch is imported."""
    for name, value in KEPT_PRIMITIVES.items():
        os.environ.setdefault(name, value)


def expand_segments() -> None:
    """Use expandable segments, unless the user has set up the allocator; must be called before torch is imported."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
