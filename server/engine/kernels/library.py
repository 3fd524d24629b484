"""The compiled loops, and the cache directory of their machine code."""

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
from server.engine.kernels.chain import chain_loop
from server.engine.kernels.products import product_loop
from server.engine.kernels.small import SmallLoops, small_loops
from server.engine.kernels.threads import Loop, thread_number
from server.engine.kernels.tiles import HAS_TILES

STORED: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16, torch.float32: np.float32}
"""The numpy type with which compiled code reads each dtype."""


@dataclass(frozen=True)
class Kernels:
    """The loops, compiled at their first use or loaded from the cache."""

    keep: bool
    """Whether to cache the machine code on disk."""

    @property
    def has_tiles(self) -> bool:
        """Whether the processor has AMX, and this process may use it."""
        return HAS_TILES and _may_use_tiles()

    @property
    def thread_number(self) -> int:
        """The address of a function; see `threads.thread_number`."""
        return thread_number()

    def product(self, kind: int) -> Loop:
        """The loop for products of bfloat16 of a kind, if `has_tiles`; see `product_loop`."""
        return product_loop(kind, keep=self.keep)

    def chain(self) -> Loop:
        """The loop that runs loops one after another, if `has_tiles`."""
        return chain_loop(keep=self.keep)

    def small(self, dtype: torch.dtype) -> SmallLoops:
        """The loops for norm, rotary embedding, gate and best token."""
        return small_loops(STORED[dtype], keep=self.keep)

    def attention(self, group: int, kv_heads: int, dim: int, dtype: torch.dtype) -> AttentionLoops:
        """The loops of attention; see `attention_loops`."""
        return attention_loops(group, kv_heads, dim, STORED[dtype], tiles=self.has_tiles, keep=self.keep)


@functools.cache
def _may_use_tiles() -> bool:
    """Ask the kernel for the processor's tiles; returns whether this process can use them."""
    return bool(torch.cpu._init_amx())  # noqa: SLF001 - torch asks the kernel only here, or when oneDNN needs tiles


@functools.cache
def use_kernels(cache_dir: Path | None) -> Kernels:
    """The kernels, with machine code cached in a subdirectory of `cache_dir`; None disables the cache.

    The subdirectory's name is a hash of numba's version and all kernel sources, so every copy of Prelude with the same
    sources finds the same machine code.
    """
    if cache_dir is not None:
        sources = sorted(Path(__file__).parent.glob("*.py"))
        identity = [numba.__version__.encode(), *(source.read_bytes() for source in sources)]
        version = hashlib.sha256(b"".join(identity)).hexdigest()[:16]
        numba.config.CACHE_DIR = str(cache_dir.expanduser() / version)  # type: ignore[attr-defined]
    return Kernels(keep=cache_dir is not None)
