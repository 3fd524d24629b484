"""Creates stores with any number of tasks, in the format of a publish, for benchmarks that need thousands."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from server.contracts import ModelSpec
from server.registry.events import Event, NewVersion, Publish, content_of
from server.registry.objects import LocalObjects
from server.registry.store import Store
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

NUM_VIRTUAL_TOKENS = 20

SPEC = ModelSpec(
    name="SmolLM2-135M-Instruct",
    fingerprint="256b77ed5c8bf47757d67089e86dae81",
    hidden_size=576,
    num_hidden_layers=30,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_model_len=2048,
    dtype="bfloat16",
    device="cpu",
)
"""The embedded model; it is not loaded."""


def task_name(number: int) -> str:
    """The name of a task, numbered from 1."""
    return f"customer-{number:06d}"


def make_store(folder: Path, tasks: int) -> None:
    """Write one version of each task, with a manifest like those of `prelude train`."""
    store = Store(LocalObjects(folder))
    manifest = json.loads((Path(__file__).parents[1] / "prompts" / "sms_spam" / "manifest.json").read_text())
    for number in tqdm(range(1, tasks + 1), f"publishing {tasks:,}", unit="task"):
        task = task_name(number)
        tensor = torch.randn(NUM_VIRTUAL_TOKENS, SPEC.hidden_size, generator=torch.Generator().manual_seed(number))
        about = Manifest.model_validate({**manifest, "task": task, "description": f"Is it spam, says {task}?"})
        soft_prompt = SoftPrompt("PROMPT_TUNING", tensor, about)
        content = content_of(soft_prompt, store.put(soft_prompt))
        assert store.append(
            Event(number, "2026-01-01T00:00:00.000+00:00", "api", "key", Publish((NewVersion(task, 1, content),)))
        )
