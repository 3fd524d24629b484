"""An inbox, and the server that reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.contracts import ModelSpec
from server.errors import UnknownTask
from server.registry.inbox import Inbox
from server.registry.registry import Registry
from server.registry.store import Store
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import wait_until
from tests.registry.fakes import MemoryObjects, NotingEngine
from tests.support import random_soft_prompt

PATIENCE = 10.0
"""Seconds until a test gives up, where how long it takes does not matter."""


class Server:
    """A registry and its inbox, as one server after another opens them."""

    def __init__(self, prompts: Path, objects: MemoryObjects, model: ModelSpec) -> None:
        self.engine = NotingEngine()
        self.registry = Registry(Store(objects), model, 32)
        self.registry.connect(self.engine)
        self.inbox = Inbox(prompts, self.registry)

    def scan(self) -> Registry:
        """Look once, waiting for nothing."""
        self.inbox.scan(settle_seconds=0)
        return self.registry

    @contextmanager
    def watching(self) -> Iterator[Registry]:
        """Scan as a server that starts, and watch until the block ends."""
        self.inbox.scan(settle_seconds=0)
        self.inbox.start()
        try:
            yield self.registry
        finally:
            self.inbox.stop()
            wait_until(lambda: not self.inbox._thread.is_alive(), PATIENCE)


class Home:
    """A `prompts/` directory, and a store beside it."""

    def __init__(self, prompts: Path, model: ModelSpec) -> None:
        self.prompts, self.model, self.objects = prompts, model, MemoryObjects()

    def drop(self, name: str, seed: int, **manifest: str) -> SoftPrompt:
        """Put an entry into the inbox, or replace its files."""
        soft_prompt = random_soft_prompt(self.model, seed=seed, manifest=manifest)
        aside = self.prompts.parent / f"{self.prompts.name}.aside"
        save_soft_prompt(aside, soft_prompt, self.model)
        (self.prompts / name).mkdir(exist_ok=True, parents=True)
        for file in aside.iterdir():
            os.replace(file, self.prompts / name / file.name)
        return soft_prompt

    def server(self) -> Server:
        return Server(self.prompts, self.objects, self.model)

    def restart(self) -> Registry:
        return self.server().scan()

    def remove(self, name: str) -> None:
        shutil.rmtree(self.prompts / name)

    @property
    def num_events(self) -> int:
        return len(self.objects.list("events"))


def live(registry: Registry) -> dict[str, int]:
    return {task.name: task.live.number for task in registry.tasks() if task.live is not None}


def digest(registry: Registry, task: str) -> str | None:
    try:
        return registry.resolve(task).content.digest
    except UnknownTask:
        return None
