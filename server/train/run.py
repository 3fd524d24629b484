"""One training run, from files to a PEFT directory: what `prelude train` does, without the terminal."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.engine.model import FrozenModel
from server.errors import ConfigurationError, InvalidTrainingData
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.manifest import INPUT_FIELD, BaseModelRef, GenerationDefaults, Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.data import Example, encode_examples, labels_of, read_data
from server.train.initial import initial_embeddings
from server.train.trainer import Progress, TrainingConfig, TrainingResult, train


@dataclass(frozen=True)
class TaskFiles:
    """What a training run is given beside its hyperparameters."""

    task: str
    training: Path
    validation: Path
    input_template: str = "{input}\n"
    init_text: str | None = None
    description: str | None = None
    licence: str | None = None


def train_task(
    model: FrozenModel, files: TaskFiles, config: TrainingConfig, on_step: Callable[[Progress], None]
) -> tuple[SoftPrompt, TrainingResult]:
    """Read, check, train; the soft prompt carries its manifest.

    Raises:
        InvalidTrainingData: before any step is run.
    """
    training, validation = read_data(files.training), read_data(files.validation)
    labels = labels_of(training.rows)
    if files.input_template.count(INPUT_FIELD) != 1:
        raise InvalidTrainingData(
            f"The input template {files.input_template!r} does not hold {INPUT_FIELD} exactly once.",
            remedy=f"Write {INPUT_FIELD} where the row's input belongs.",
        )
    draft = Manifest(input_template=files.input_template)
    examples = encode_examples(training, model, draft, config.num_virtual_tokens)
    held_out = encode_examples(validation, model, draft, config.num_virtual_tokens)
    initial = initial_embeddings(
        model, config.init, config.num_virtual_tokens, config.seed, text=files.init_text, labels=labels
    )
    result = train(model, initial, examples, held_out, config, on_step)
    manifest = Manifest(
        task=files.task,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base_model=BaseModelRef(name=model.spec.name, fingerprint=model.spec.fingerprint),
        peft_type="PROMPT_TUNING",
        num_virtual_tokens=config.num_virtual_tokens,
        hidden_size=model.spec.hidden_size,
        description=files.description,
        input_template=files.input_template,
        generation=GenerationDefaults(max_new_tokens=_longest_target([*examples, *held_out])),
        labels=labels,
        licence=files.licence,
        training={
            "data_sha256": training.sha256,
            "validation_sha256": validation.sha256,
            "rows": len(training.rows),
            "best_step": result.step,
            "dtype": model.spec.dtype,
            **config.as_dict(),
        },
        metrics={
            "validation_exact_match": round(result.validation.exact_match, 4),
            "validation_loss": round(result.validation.loss, 4),
            "validation_rows": len(validation.rows),
        },
    )
    unnamed = SoftPrompt("PROMPT_TUNING", result.prompt_embeddings, manifest)
    named = manifest.model_copy(update={"digest": unnamed.digest, "prefix_hash": unnamed.prefix_hash})
    return SoftPrompt("PROMPT_TUNING", result.prompt_embeddings, named), result


def check_writable(directory: Path) -> None:
    """Refuse a directory that `write_task` could not write, before the hours of training and not after them.

    Raises:
        ConfigurationError: it, or what it would be made in, cannot be written to.
    """
    try:
        for wanted in (directory, directory.parent):
            nearest = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as exc:
        raise ConfigurationError(
            f"The soft prompt cannot be written to {directory}: {exc.strerror}.",
            remedy="Let --out name a folder that can be written to.",
        ) from exc


def write_task(directory: Path, soft_prompt: SoftPrompt, model: FrozenModel) -> None:
    """Write the PEFT directory beside its place, then move its files in, the tensor last."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
    try:
        save_soft_prompt(temporary, soft_prompt, model.spec)
        for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _longest_target(examples: list[Example]) -> int:
    return max(len(example.target_ids) for example in examples)
