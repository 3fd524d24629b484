"""Computed prefixes, by the hash of the soft prompt's numbers: never by a name, so none can be stale.

A prefix (`kv_cache.Computed`) is what the engine makes of any soft prompt. It is copied into the slot of
each sequence that starts, so dropping one here touches nobody who is running.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch

from server.core import ModelSpec
from server.engine.kv_cache import Computed
from server.soft_prompts.soft_prompt import SoftPrompt


class PrefixCache:
    """Prefixes within a memory budget, least recently used out first; the newest always stays.

    Attributes:
        hits: sequences that found their prefix, also those that waited for another one to compute it.
        misses: sequences that did not, and had to compute it.
        computed: prefixes that were put in.
        evicted: those that had to go again for want of memory.
    """

    def __init__(self, budget_bytes: int) -> None:
        """An empty cache."""
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self.computed = 0
        self.evicted = 0
        self._prefixes: OrderedDict[str, Computed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prefixes)

    def __contains__(self, prefix_hash: str) -> bool:
        return prefix_hash in self._prefixes

    def get(self, prefix_hash: str) -> Computed | None:
        """The prefix, now the most recently used one, or None."""
        prefix = self._prefixes.get(prefix_hash)
        if prefix is None:
            self.misses += 1
            return None
        self._prefixes.move_to_end(prefix_hash)
        self.hits += 1
        return prefix

    def make_room(self, num_bytes: int) -> None:
        """Drop the least recently used prefixes until another one of this size is within the budget.

        Called before the other one is made, so that both together never take more than the budget.
        """
        while self._prefixes and self.num_bytes + num_bytes > self.budget_bytes:
            _, dropped = self._prefixes.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
            self.evicted += 1

    def put(self, prefix_hash: str, prefix: Computed) -> None:
        """Keep a prefix and drop the least recently used ones beyond the budget."""
        assert prefix_hash not in self._prefixes, "a prefix is computed once"
        self.make_room(prefix.num_bytes)
        self._prefixes[prefix_hash] = prefix
        self.num_bytes += prefix.num_bytes
        self.computed += 1

    def drop(self, prefix_hash: str) -> None:
        """Forget a prefix, if it is here."""
        dropped = self._prefixes.pop(prefix_hash, None)
        if dropped is not None:
            self.num_bytes -= dropped.num_bytes

    def check_integrity(self) -> None:
        """Assert that the bytes are those of the prefixes held."""
        assert self.num_bytes == sum(prefix.num_bytes for prefix in self._prefixes.values())


def prefix_of_kv(soft_prompt: SoftPrompt, model: ModelSpec) -> Computed:
    """The prefix of a soft prompt that is keys and values already: PEFT's `[n, layers * 2 * heads * dim]`, turned."""
    assert not model.state_width, "a soft prompt of keys and values is refused where they are not all"
    shape = (-1, model.num_kv_layers, 2, model.num_key_value_heads, model.head_dim)
    prefix = soft_prompt.tensor.view(shape).permute(1, 2, 0, 3, 4)
    return Computed(prefix.to(model.device, getattr(torch, model.dtype)).contiguous())
