"""Sizes of units of work and forms of numbers, as compiled loops and those who call them know them."""

from __future__ import annotations

import functools

import numpy as np

BLOCK, QUERIES = 64, 16
"""Positions, and tokens, of a chunk that make up a unit of work."""

EVERYTHING = 1 << 40
"""A window that leaves out nothing."""

ROWS = 8
"""Tokens that are one unit of a compiled loop's work."""


@functools.cache
def float_bits(number: float) -> int:
    """A number's bits as float32, in an integer: how compiled loops take it."""
    return int(np.float32(number).view(np.int32))
