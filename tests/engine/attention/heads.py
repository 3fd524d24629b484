"""Heads that compiled attention is tried with."""

from __future__ import annotations

import torch

from tests.engine.pool import Heads

ALL_HEADS = [
    Heads(1, 3, 8, torch.float32),
    Heads(3, 2, 64, torch.bfloat16),
    Heads(2, 2, 12, torch.bfloat16),
    Heads(4, 1, 96, torch.bfloat16),
    Heads(8, 2, 4, torch.float32),
]
