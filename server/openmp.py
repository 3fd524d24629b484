"""How OpenMP's threads wait, what oneDNN keeps, and how CUDA's memory is allocated: set before torch is loaded.

A matrix product is shared out to threads that meet at its end. GNU's OpenMP lets an early thread spin for some
milliseconds before it sleeps. That is right on a machine with nothing else to do. But where another program, or this
server's own event loop, has taken a core, the early thread spins on the core that the late one needs, at each of the
hundreds of meetings of a step: beside one busy program two cores gave a third of the tokens that they give with short
spinning (`benchmarks/RESULTS.md`), and on an idle machine short spinning costs nothing that could be measured.

oneDNN generates code for every number of rows that a product has, and keeps it. Mixed requests have any number of them,
so a server would grow by half a gigabyte over thousands of steps. With a quarter of the usual room it grows by a
fifth of one, soon, and then no more.

torch's allocator for CUDA cuts blocks from segments of fixed size, and a block that is free in one does not serve a
larger request. Expandable segments grow and shrink by pages, so free memory stays usable for requests of any size.
"""

from __future__ import annotations

import os

SPIN_COUNT = "3000"
"""Turns of the waiting loop, some ten nanoseconds each."""

KEPT_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Products whose code is kept, by oneDNN and by torch's layer over it."""

ALLOCATOR = "expandable_segments:True"

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of one setting, the newest first."""

OF_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which a user chooses how threads wait."""


def share_cores() -> None:
    """Let threads that wait give their core away soon; only works before torch is imported."""
    if not any(name in os.environ for name in OF_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def bound_primitives() -> None:
    """Let oneDNN keep less of what it generates, unless the user says how much; only works before torch is imported."""
    for name, value in KEPT_PRIMITIVES.items():
        os.environ.setdefault(name, value)


def expand_segments() -> None:
    """Let torch's allocator for CUDA keep fewer fragments, unless the user has set it up; before torch is imported."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR
