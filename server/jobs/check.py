"""Checks a job before it is queued, because a job that fails after an hour in the queue wastes that hour."""

from collections.abc import Callable
from dataclasses import dataclass

from server.contracts import ModelSpec
from server.errors import InvalidRequest, InvalidTaskName, InvalidTrainingData, PreludeError
from server.jobs.folder import JobFolder
from server.jobs.job import DataNames, Failure, JobSpec
from server.soft_prompts.names import check_task_name
from server.soft_prompts.soft_prompt import check_size
from server.train.config import contradiction
from server.train.data import CanFit, Encode, check_lengths
from server.train.inputs import TaskFiles, read_task


@dataclass(frozen=True)
class Frame:
    """Facts about the server and its model that a job's specification is checked against."""

    model: ModelSpec
    max_virtual_tokens: int
    encode: Encode
    can_fit: CanFit
    """Whether texts may fit the context together, found without tokenising them."""


def check_spec(spec: JobSpec, frame: Frame) -> None:
    """Refuse what can never be trained or published here, whatever the data.

    Raises:
        InvalidTaskName, InvalidSoftPrompt: the name, the number of virtual tokens, or the method for this model.
        InvalidRequest: it trains several tasks, or contradicts itself.
    """
    check_task_name(spec.task)
    if spec.task == frame.model.name:
        raise InvalidTaskName(f"{spec.task!r} is the frozen model's name.", remedy="Choose another name for the task.")
    config = spec.config
    check_size(config.peft_type, config.num_virtual_tokens, frame.model, frame.max_virtual_tokens)
    if config.method == "multitask_prompt_tuning":
        raise InvalidRequest(
            "A job trains one task, and multitask prompt tuning several.",
            remedy="Send a job for each task, or train them together with `prelude train`.",
            param="config.method",
        )
    if (found := contradiction(config, spec.input_template, spec.system_message)) is not None:
        raise InvalidRequest(found.message, remedy=found.remedy, param=found.field)
    teacher = config.teacher_template
    if teacher is not None and (not frame.can_fit(teacher) or len(frame.encode(teacher)) > frame.model.max_model_len):
        raise InvalidRequest(
            f"The teacher's text does not fit the context, which holds {frame.model.max_model_len} tokens.",
            remedy="Shorten it, or raise PRELUDE_MAX_MODEL_LEN.",
            param="config.teacher_template",
        )


def check_data(
    spec: JobSpec, folder: JobFolder, names: DataNames, frame: Frame, check_cancelled: Callable[[], None] = lambda: None
) -> None:
    """Read all rows as the run will.

    `check_cancelled` is called before each row; if it raises, the check stops with that error. An InvalidTrainingData
    names file and line, by the names that the client used.
    """
    config = spec.config
    held = folder.validation if folder.validation.exists() else None
    files = TaskFiles(spec.task, folder.data, held, spec.input_template, spec.system_message)
    try:
        rows = read_task(files, config, check_cancelled)
        for data in (*rows.training, *rows.validation):
            check_lengths(
                data,
                files.input_manifest,
                config.num_virtual_tokens,
                frame.encode,
                frame.model.max_model_len,
                can_fit=frame.can_fit,
                check_cancelled=check_cancelled,
            )
    except InvalidTrainingData as exc:
        raise InvalidTrainingData(
            in_their_words(exc.message, folder, names), remedy=in_their_words(exc.remedy, folder, names)
        ) from exc


def in_their_words(text: str, folder: JobFolder, names: DataNames) -> str:
    """A message without the server's paths."""
    text = text.replace(str(folder.data), names.data)
    return text.replace(str(folder.validation), names.validation or "the validation rows")


def as_failure(exc: PreludeError, folder: JobFolder, names: DataNames) -> Failure:
    """The failure of a job that an error ended, without the server's paths."""
    return Failure(in_their_words(exc.message, folder, names), exc.code, in_their_words(exc.remedy, folder, names))
