"""How OpenMP's threads wait for one another, which must be said before torch is loaded.

A matrix product is shared out to threads that meet at its end. GNU's OpenMP lets whoever is early spin for some
milliseconds before it sleeps. That is right on a machine with nothing else to do. But where another program, or this
server's own event loop, has taken a core, the early thread spins on the core that the late one needs, at each of the
hundreds of meetings of a step: beside one busy program two cores gave a third of the tokens that they give with short
spinning (`benchmarks/RESULTS.md`), and on an idle machine short spinning costs nothing that could be measured.
"""

from __future__ import annotations

import os

SPIN_COUNT = "3000"
"""Turns of the waiting loop, some ten nanoseconds each."""

OF_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Whoever sets one of these has chosen."""


def share_cores() -> None:
    """Let threads that wait give their core away soon; only works before torch is imported."""
    if not any(name in os.environ for name in OF_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
