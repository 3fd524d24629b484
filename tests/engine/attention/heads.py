"""Heads that compiled attention is tried with.

To compile the loops of a shape takes five seconds: tiny models (tests/support.py) and the embedded model use the same.
"""

from __future__ import annotations

import torch

from tests.engine.pool import Heads

ALL_HEADS = [
    Heads(1, 2, 8, torch.float32),
    Heads(3, 3, 64, torch.bfloat16),
    Heads(2, 2, 12, torch.bfloat16),
    Heads(4, 1, 96, torch.float32),
    Heads(8, 2, 4, torch.float32),
]
