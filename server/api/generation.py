"""From a front end's words to a request of the engine: which soft prompt, which text, which sampling rules."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from server.core import GenerationRequest
from server.engine.worker import EngineWorker
from server.errors import EmptyInput, InputTooLong
from server.registry.registry import Registry, Resolved
from server.soft_prompts.manifest import GenerationDefaults
from server.soft_prompts.soft_prompt import SoftPrompt

LONG_TEXT = 4096
"""Characters beyond which a text is tokenised on another thread than the event loop's."""


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine, and what it was resolved to."""

    request: GenerationRequest
    resolved: Resolved | None

    @property
    def soft_prompt(self) -> SoftPrompt | None:
        """The soft prompt that answers, or None for the frozen model alone."""
        return None if self.resolved is None else self.resolved.soft_prompt

    def headers(self, worker: EngineWorker) -> dict[str, str]:
        """Headers that say what answered; a model's name that is not ASCII is percent-encoded."""
        headers = {"Prelude-Model": quote(worker.model.name, safe=" !#$&'()*+,/:;=?@[]")}
        if self.resolved is not None:
            headers |= {"Prelude-Task": self.resolved.task, "Prelude-Version": str(self.resolved.version)}
        return headers


async def prepare(
    worker: EngineWorker,
    registry: Registry,
    *,
    task: str | None,
    text: str,
    sampling: Mapping[str, Any],
    sample: bool = False,
    truncate: int | None = None,
) -> Prepared:
    """Resolve, template and tokenise.

    Args:
        worker: for the tokenizer and the model's limits.
        registry: where tasks are looked up.
        task: `task` or `task@version`; None is the frozen model alone.
        text: the user's text, before the task's template.
        sampling: the fields of SamplingParams that the request sets itself.
        sample: the request asks for sampling and leaves the temperature to the task; 1 if that is greedy.
        truncate: keep only the last so many input tokens.

    Raises:
        UnknownTask, InvalidTaskName, EmptyInput.
        InputTooLong: the text can never fit, however it is tokenised.
    """
    resolved = None if task is None else registry.resolve(task)
    if not text:
        raise EmptyInput("`inputs` is empty.")
    templated = text if resolved is None else resolved.soft_prompt.manifest.render(text)
    input_ids = await _encode(worker, templated, truncate)
    defaults = GenerationDefaults() if resolved is None else resolved.soft_prompt.manifest.generation
    if sample and not defaults.temperature:
        sampling = {**sampling, "temperature": 1.0}
    virtual = 0 if resolved is None else resolved.soft_prompt.num_virtual_tokens
    room = worker.model.max_model_len - virtual - len(input_ids)
    params = defaults.sampling_params(sampling, room=room, seed=secrets.randbits(63))
    request = GenerationRequest(uuid.uuid4().hex, tuple(input_ids), params, resolved.task if resolved else None)
    return Prepared(request, resolved)


async def _encode(worker: EngineWorker, text: str, truncate: int | None) -> list[int]:
    """Token ids of a templated text, the last `truncate` of them.

    The tokenizer lets no other thread run while it works, a second for some million characters, so a text that can
    never fit is refused, or cut, by its characters.
    """
    if len(text) > worker.max_characters:
        if truncate is None:
            raise InputTooLong(
                f"The input has {len(text):,} characters; the context of {worker.model.max_model_len:,} tokens holds "
                f"at most {worker.max_characters:,}."
            )
        text = text[-worker.max_characters :]
    ids = await asyncio.to_thread(worker.encode, text) if len(text) > LONG_TEXT else worker.encode(text)
    return ids if truncate is None else ids[-truncate:]
