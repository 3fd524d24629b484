"""The files and rows of a run. Free of torch, so that faults are reported at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.errors import InvalidTrainingData
from server.soft_prompts.manifest import Manifest, SystemMessage
from server.train.config import TrainingConfig, contradiction
from server.train.data import DataFile, check_rows, hold_out, labels_of, read_data


@dataclass(frozen=True)
class FoundStart:
    """The published task that was found to be nearest by function."""

    task: str
    similarity: float


@dataclass(frozen=True)
class TaskFiles:
    """What a training run is given beside its hyperparameters."""

    task: str
    training: Path | tuple[Path, ...]
    """Several only for multitask prompt tuning: one for each task."""
    validation: Path | tuple[Path, ...] | None = None
    """The validation files, one for each training file; None holds out a tenth of the rows."""
    input_template: str = "{input}\n"
    system_message: SystemMessage | None = None
    """What the task does with a chat's system message; None leaves it to the manifest's default."""
    description: str | None = None
    licence: str | None = None
    max_virtual_tokens: int = 512
    max_new_tokens: int = 64
    """Of a teacher's answers, in distillation."""
    start: Path | None = None
    """The PEFT directory to start from, if it is not the path in `config.init_from` (in a job, it is the folder's
    copy)."""

    found_start: FoundStart | None = None
    """With `start`: the task that it was found as, for the manifest."""

    @property
    def input_manifest(self) -> Manifest:
        """The fields that say what the model reads of a row."""
        return Manifest(input_template=self.input_template, system_message=self.system_message)

    def start_of(self, config: TrainingConfig) -> Path | None:
        """The PEFT directory that the run begins with, if it begins with one."""
        return self.start or (None if config.init_from is None else Path(config.init_from))


@dataclass(frozen=True)
class TaskRows:
    """The rows of each task; only multitask prompt tuning has more than one task.

    Attributes:
        training: to learn from.
        validation: to measure on.
        labels: the classes of each; None where text is written, or a teacher answers.
    """

    training: tuple[DataFile, ...]
    validation: tuple[DataFile, ...]
    labels: tuple[tuple[str, ...] | None, ...]


def read_task(files: TaskFiles, config: TrainingConfig, check_cancelled: Callable[[], None] = lambda: None) -> TaskRows:
    """Read and check all rows; `check_cancelled` is called before each line, and if it raises, the reading ends.

    Raises InvalidTrainingData if the options contradict each other, or a file or row is invalid.
    """
    check_kind(files, config)
    need = config.teacher_template is None
    paths = files.training if isinstance(files.training, tuple) else (files.training,)
    held = files.validation if isinstance(files.validation, tuple | None) else (files.validation,)
    if held is not None and len(held) != len(paths):
        raise InvalidTrainingData(
            f"{len(paths)} data files and {len(held)} validation files.", remedy="Give one for each, or none."
        )
    pairs = []
    for number, path in enumerate(paths):
        data = read_data(path, need_targets=need, check_cancelled=check_cancelled)
        if held is None:
            pairs.append(hold_out(data))
        else:
            measured = read_data(held[number], need_targets=need, check_cancelled=check_cancelled)
            pairs.append((data, measured))
    labels = [labels_of(training.rows) if need else None for training, _ in pairs]
    for (training, validation), of in zip(pairs, labels, strict=True):
        check_rows(training, validation, of)
    if config.init == "labels" and not (config.labels or labels[0]):
        raise InvalidTrainingData(
            f"init is 'labels', and the targets of {paths[0]} are no labels: too many, or too seldom repeated.",
            remedy="Use init 'vocab' or 'text'.",
        )
    return TaskRows(tuple(one for one, _ in pairs), tuple(other for _, other in pairs), tuple(labels))


def check_kind(files: TaskFiles, config: TrainingConfig) -> None:
    """Raise InvalidTrainingData if files and configuration contradict each other."""
    several = isinstance(files.training, tuple) and len(files.training) > 1
    if several != (config.method == "multitask_prompt_tuning"):
        raise InvalidTrainingData(
            "Several data files are the tasks of multitask prompt tuning, which needs at least two.",
            remedy="Give --data once; or give it once for each task, with --method multitask_prompt_tuning.",
        )
    if several and config.teacher_template is not None:
        raise InvalidTrainingData("Several tasks cannot be distilled together.", remedy="Distil one after the other.")
    if (found := contradiction(config, files.input_template, files.system_message)) is not None:
        raise InvalidTrainingData(found.message, remedy=found.remedy)
