"""Machine code for what torch does badly on a CPU, made by numba at the start: it needs no C++ compiler.

    attention.py   attention of a step, each sequence for itself
    small.py       norms, rotary embeddings and gates, which torch spreads over many operators; the best token
    threads.py     how they run: on torch's own threads
    vectors.py     the inner loops of attention, in LLVM's instructions
    compiler.py    numba's compiler, and where machine code is kept
    arithmetic.py  bfloat16 and float32, and the exponential function

All of it is optional: without numba, torch does the same.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from server.engine.attention import compiled_rows as compiled_attention
from server.engine.fast import operators
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
        shared = (compiled_attention, operators)  # from which they take the sizes of units of work
        sources = sorted(Path(__file__).parent.glob("*.py")) + [Path(inspect.getfile(module)) for module in shared]
        version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        numba.config.CACHE_DIR = str(cache_dir.expanduser() / version)  # type: ignore[attr-defined]
    return Kernels(keep=cache_dir is not None)


__all__ = ["AttentionLoops", "Kernels", "SmallLoops", "use_kernels"]
