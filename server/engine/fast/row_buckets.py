"""The numbers of rows that a step's matrix products have: a step is padded to one of a few.

oneDNN generates code for each number of rows, which takes milliseconds at the first product with that number. With
padding, all code is generated at start (`linear.py`), and AMX's tiles of 16 rows are full.
"""

from __future__ import annotations

TILE = 16
"""Numbers of rows above this one are padded to a multiple of it."""

FEWEST = 2
"""A product with one row is a product of a matrix and a vector, which oneDNN may add up in another order."""


def bucket(rows: int) -> int:
    """The number of rows that a step with this many is padded to."""
    return max(FEWEST, rows) if rows <= TILE else -(-rows // TILE) * TILE


def buckets(most: int) -> list[int]:
    """All numbers of rows that steps with at most this many are padded to."""
    return sorted({bucket(rows) for rows in range(1, most + 1)})
