"""The compiled loops, and the folder that keeps their machine code."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from server.engine.kernels.attention import AttentionLoops, attention_loops
from server.engine.kernels.small import SmallLoops, small_loops

STORED: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16, torch.float32: np.float32}
"""What compiled code reads numbers as."""


@dataclass(frozen=True)
class Kernels:
    """Loops, compiled when they are first asked for, or read from a cache.

    Attributes:
        keep: whether their machine code is kept.
    """

    keep: bool

    def small(self, dtype: torch.dtype) -> SmallLoops:
        """Norm, rotary embedding, gate."""
        return small_loops(STORED[dtype], keep=self.keep)

    def attention(self, group: int, kv_heads: int, dim: int, dtype: torch.dtype) -> AttentionLoops:
        """Attention; see `attention_loops`."""
        return attention_loops(group, kv_heads, dim, STORED[dtype], keep=self.keep)


@functools.cache
def use_kernels(cache_dir: Path | None) -> Kernels:
    """The kernels, whose machine code is kept in a directory of `cache_dir`; None keeps nothing.

    Other code has another directory: numba itself only sees a change of the file that a function is written in.
    """
    if cache_dir is not None:
        sources = sorted(Path(__file__).parent.glob("*.py"))
        version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        numba.config.CACHE_DIR = str(cache_dir.expanduser() / version)  # type: ignore[attr-defined]
    return Kernels(keep=cache_dir is not None)
