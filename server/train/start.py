"""The start of a run: its values, its declaration for the manifest, and the values computed from a declaration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from server.engine.model.frozen import FrozenModel
from server.errors import PreludeError
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import TrainingStart, declared_start, hash_of_ids
from server.train.config import NEAREST_TASK, TrainingConfig
from server.train.data import DataFile
from server.train.distil import Teacher, teacher_ids, text_states
from server.train.initial import initial_token_ids, load_start, values_of_tokens
from server.train.methods import KeyValues, join_key_values, split_key_values


def begin(
    model: FrozenModel, config: TrainingConfig, data: DataFile, labels: Sequence[str] | None, directory: Path | None
) -> tuple[torch.Tensor | KeyValues, TrainingStart]:
    """Initial values of a run, and their declaration.

    Args:
        directory: the PEFT directory for `init=soft_prompt`.

    Raises:
        InvalidTrainingData: the configured start lacks its input, or does not fit.
    """
    assert config.init != NEAREST_TASK, "the caller has looked for it, see interpret/nearest_task.py"
    if config.may_begin_as_teacher and (ids := teacher_ids(model, config, data)) is not None:
        start = TrainingStart(teacher_tokens=len(ids), token_ids_sha256=hash_of_ids(ids))
        return text_states(model, ids, config.num_virtual_tokens), start
    if config.init == "soft_prompt":
        found = load_start(model, config, directory)
        values = split_key_values(found.tensor, model.spec) if found.is_kv_prefix else found.tensor.float()
        return values, TrainingStart(prefix_hash=found.prefix_hash)
    start = declared_tokens(model, config, labels)
    return _of_tokens(model, start, is_kv_prefix=config.method == "prefix_tuning"), start


def declared_tokens(model: FrozenModel, config: TrainingConfig, labels: Sequence[str] | None) -> TrainingStart:
    """The declaration of a start at real tokens, or at random numbers of their scale."""
    ids = initial_token_ids(model, config, labels)
    return TrainingStart(initial_token_ids=tuple(ids), random_seed=config.seed if config.init == "random" else None)


def start_values(model: FrozenModel, soft_prompt: SoftPrompt, others: Sequence[SoftPrompt] = ()) -> torch.Tensor | None:
    """What a soft prompt was before training, in float32 on the CPU, in the shape of its tensor.

    Args:
        others: soft prompts that it may have started from.

    Returns:
        None if the start is unknown: not declared, not for this model, or a soft prompt that is not among `others`.
    """
    start, count = declared_start(soft_prompt.manifest), soft_prompt.num_virtual_tokens
    if start is None or (start.kept is not None and len(start.kept) != count):
        return None
    whole = _trained_values(model, soft_prompt, start, others, start.num_virtual_tokens or count)
    return whole if whole is None or start.kept is None else whole[list(start.kept)]


def _trained_values(
    model: FrozenModel, soft_prompt: SoftPrompt, start: TrainingStart, others: Sequence[SoftPrompt], count: int
) -> torch.Tensor | None:
    """The start of all `count` virtual tokens that were trained, `[count, width]`; None if it is unknown."""
    if start.prefix_hash is not None:
        shape = (count, *soft_prompt.tensor.shape[1:])
        found = (other.tensor for other in others if other.prefix_hash == start.prefix_hash)
        return next((tensor.detach().float().cpu() for tensor in found if tensor.shape == shape), None)
    values: torch.Tensor | KeyValues | None = None
    try:
        if start.teacher_tokens is not None:
            values = _of_teacher(model, soft_prompt, start, count)
        else:
            ids = start.initial_token_ids or ()
            is_alike = len(ids) == count and all(0 <= i < model.spec.vocab_size for i in ids)
            if is_alike:
                values = _of_tokens(model, start, is_kv_prefix=soft_prompt.is_kv_prefix)
    except (PreludeError, ValidationError):  # a declaration that does not fit this model, or a template without a place
        return None
    if values is None or isinstance(values, torch.Tensor):
        return values
    return join_key_values(values)


def _of_tokens(model: FrozenModel, start: TrainingStart, *, is_kv_prefix: bool) -> torch.Tensor | KeyValues:
    return values_of_tokens(model, start.initial_token_ids or (), start.random_seed, is_kv_prefix=is_kv_prefix)


def _of_teacher(
    model: FrozenModel, soft_prompt: SoftPrompt, start: TrainingStart, num_virtual_tokens: int
) -> KeyValues | None:
    """Keys and values of the teacher's last tokens, if its text still gives the declared tokens."""
    training = soft_prompt.manifest.training or {}
    template, count = training.get("teacher_template"), start.teacher_tokens or 0
    if not isinstance(template, str) or not soft_prompt.is_kv_prefix:
        return None
    ids = Teacher(model, template, bool(training.get("teacher_chat"))).encode("-")[:count]
    is_long_enough = num_virtual_tokens <= len(ids) <= model.spec.max_model_len
    if not is_long_enough or hash_of_ids(ids) != start.token_ids_sha256:
        return None
    return text_states(model, ids, num_virtual_tokens)
