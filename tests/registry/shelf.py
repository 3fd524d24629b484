"""A shelf: one store in memory, and any number of registries on it."""

from __future__ import annotations

from server.contracts import ModelSpec
from server.registry.events import VersionContent, content_of
from server.registry.registry import Registry
from server.registry.store import Store
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.registry.fakes import MemoryObjects
from tests.support import random_soft_prompt

SPEC = ModelSpec(
    name="tiny-llama",
    fingerprint="f1",
    hidden_size=8,
    num_hidden_layers=1,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=16,
    max_model_len=64,
    dtype="float32",
    device="cpu",
)


def content(seed: int, **manifest: object) -> SoftPrompt:
    return random_soft_prompt(SPEC, seed=seed, manifest=manifest)


def identity(soft_prompt: SoftPrompt) -> str:
    return content_of(soft_prompt, "").identity


def put_blob(store: Store, soft_prompt: SoftPrompt) -> VersionContent:
    return content_of(soft_prompt, store.put(soft_prompt))


class Shelf:
    """A store, and registries on it."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()

    def open(self, model: ModelSpec = SPEC, max_virtual_tokens: int = 32) -> Registry:
        return Registry(Store(self.objects), model, max_virtual_tokens)

    def digests(self) -> list[str]:
        return sorted(name.partition("-")[0] for name in self.objects.blobs())

    def num_events(self) -> int:
        return len(self.objects.list("events"))

    def damage(self, soft_prompt: SoftPrompt) -> None:
        for key in self.objects.objects:
            if key.startswith(f"blobs/{soft_prompt.digest}"):
                self.objects.objects[key] = self.objects.objects[key][:-1]


def serving(registry: Registry, reference: str) -> SoftPrompt:
    """The soft prompt that answers a request now."""
    return registry.fetch(registry.resolve(reference)).result()


def put(registry: Registry, task: str, soft_prompt: SoftPrompt) -> tuple[int, bool]:
    """Publish; answers the version, and whether it is new."""
    published = registry.publish(task, [soft_prompt], "api")
    assert serving(registry, task).digest == soft_prompt.digest
    return published.tasks[0].version, published.created


def snapshot(registry: Registry) -> dict[str, tuple[object, dict[int, str]]]:
    """Who answers, and what there is."""
    return {t.name: (t.traffic, {n: v.content.digest for n, v in t.versions.items()}) for t in registry.tasks()}
