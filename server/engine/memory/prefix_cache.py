"""Computed prefixes, by the hash of the soft prompt's numbers: never by a name, so none can be stale.

A prefix (`kv_cache.Computed`) is what the engine makes of any soft prompt. It is copied into the slot of each sequence
that starts, so dropping one here touches nobody who is running.
"""

from collections import OrderedDict
from collections.abc import Iterator

from server.engine.memory.kv_cache import Computed


class PrefixCache:
    """Prefixes within a memory budget, least recently used out first; the newest always stays.

    Attributes:
        hits: sequences whose prefix was cached, including those that waited for another sequence to compute it.
        misses: sequences that did not, and had to compute it.
        computed: prefixes that were put in.
        evicted: those that had to go again for want of memory.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.num_bytes = budget_bytes, 0
        self.hits = self.misses = self.computed = self.evicted = 0
        self._prefixes: OrderedDict[str, Computed] = OrderedDict()
        self._awaited: set[str] = set()  # prefixes that a waiting sequence has not read yet

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
        if prefix_hash in self._awaited:
            self._awaited.remove(prefix_hash)
            self.misses += 1
        else:
            self.hits += 1
        return prefix

    def make_room(self, num_bytes: int) -> None:
        """Drop the least recently used prefixes until another one of this size is within the budget.

        Called before the other one is made, so that both together never take more than the budget.
        """
        while self._prefixes and self.num_bytes + num_bytes > self.budget_bytes:
            self.drop(next(iter(self._prefixes)))
            self.evicted += 1

    def put(self, prefix_hash: str, prefix: Computed, *, is_awaited: bool = False) -> int:
        """Keep a prefix, within the budget; if a sequence waits for it, the first `get` counts as a miss.

        Returns the prefix's number. A prefix that is computed again gets a new one, because its last bits may differ.
        """
        assert prefix_hash not in self._prefixes, "a prefix is computed once"
        self.make_room(prefix.num_bytes)
        self.computed += 1
        self._prefixes[prefix_hash] = prefix._replace(number=self.computed)
        self.num_bytes += prefix.num_bytes
        if is_awaited:
            self._awaited.add(prefix_hash)
        return self.computed

    def drop(self, prefix_hash: str) -> None:
        """Forget a prefix, if it is here."""
        dropped = self._prefixes.pop(prefix_hash, None)
        self._awaited.discard(prefix_hash)
        if dropped is not None:
            self.num_bytes -= dropped.num_bytes

    def check_integrity(self) -> None:
        """Assert that the bytes are those of the prefixes held."""
        assert self.num_bytes == sum(prefix.num_bytes for prefix in self._prefixes.values())
