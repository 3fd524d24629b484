"""Fakes that obey the registry's interfaces: a store in memory that can fail, and an engine that takes note."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from server.errors import StoreError
from server.registry.registry import Registry
from server.soft_prompts.soft_prompt import SoftPrompt


class MemoryObjects:
    """Objects in a dictionary; what is written is there at once, for every registry that shares it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: Counter[str] = Counter()
        self.fails: Callable[[str, str], bool] = lambda action, key: False
        """(create, get, delete or list; key) -> whether the store is to refuse it."""
        self.before_create: Callable[[str], None] = lambda key: None
        self.loses_reply: Callable[[str, str], bool] = lambda action, key: False
        """Whether it is to refuse what it has done already."""
        self.ages: dict[str, float] = {}
        self._lock = threading.Lock()

    def blobs(self) -> list[str]:
        return self.list("blobs")

    def list(self, folder: str) -> list[str]:
        self._check("list", folder)
        with self._lock:
            return sorted(key.removeprefix(f"{folder}/") for key in self.objects if key.startswith(f"{folder}/"))

    def get(self, key: str) -> bytes | None:
        self._check("get", key)
        self.reads[key] += 1
        return self.objects.get(key)

    def create(self, key: str, data: bytes) -> bool:
        self._check("create", key)
        self.before_create(key)
        with self._lock:
            if key in self.objects:
                return False
            self.objects[key] = data
        self._check_reply("create", key)
        return True

    def delete(self, key: str) -> None:
        self._check("delete", key)
        with self._lock:
            self.objects.pop(key, None)
        self._check_reply("delete", key)

    def age(self, key: str) -> float | None:
        return self.ages.get(key, 0.0) if key in self.objects else None

    def _check(self, action: str, key: str) -> None:
        if self.fails(action, key):
            raise StoreError(f"The store refuses to {action} {key}.")

    def _check_reply(self, action: str, key: str) -> None:
        if self.loses_reply(action, key):
            raise StoreError(f"The store does not say whether it could {action} {key}.")


class NotingEngine:
    """Takes note of what it is asked to warm and to drop, and can refuse."""

    def __init__(self) -> None:
        self.warmed: list[str] = []
        self.dropped: list[str] = []
        self.on_warm: Callable[[SoftPrompt], None] = lambda soft_prompt: None

    def warm(self, soft_prompts: Sequence[SoftPrompt]) -> None:
        for soft_prompt in soft_prompts:
            self.on_warm(soft_prompt)
            self.warmed.append(soft_prompt.prefix_hash)

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        self.dropped += prefix_hashes


def with_engine(registry: Registry) -> NotingEngine:
    engine = NotingEngine()
    registry.connect(engine)
    return engine
