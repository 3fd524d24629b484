"""Options of a training run: the same fields for `prelude train`, a training job and the manifest.

The defaults should work without tuning: a short search finds the learning rate, training stops when the validation
score no longer improves, and the initial values follow Lester et al. 2021.
"""

from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from server.soft_prompts.manifest import INPUT_FIELD, SYSTEM_FIELD, SystemMessage

Method = Literal["prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning"]
Init = Literal["auto", "labels", "text", "vocab", "soft_prompt", "nearest-task", "teacher", "random"]
NEAREST_TASK: Literal["nearest-task"] = "nearest-task"

SHOWN = 200
"""Number of characters of a template that an error message quotes."""
PLACE = f"Write {INPUT_FIELD} where the row's input belongs."
MOST_STEPS, LARGEST_BATCH = 10_000_000, 4096
HIGHEST_LEARNING_RATE = 1e6
"""The largest learning rate. Above it a step would exceed the range of float32; training fails at much lower rates."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingConfig:
    """Hyperparameters."""

    method: Method = "prompt_tuning"
    """prompt_tuning (Lester et al. 2021), p_tuning (Liu et al. 2021; an MLP makes the vectors, and is not kept),
    prefix_tuning (Li and Liang 2021; keys and values of every layer), multitask_prompt_tuning (Wang et al. 2023)."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    steps: int = Field(default=600, ge=1, le=MOST_STEPS)
    batch_size: int = Field(default=16, ge=1, le=LARGEST_BATCH)
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=HIGHEST_LEARNING_RATE)] = "auto"
    """The peak; auto tries a few for some steps each and takes the best."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    init: Init = "auto"
    """Initial values. `auto` takes the teacher's keys and values for prefix tuning with a teacher; otherwise the
    labels' tokens if there are labels; otherwise sampled vocabulary. `nearest-task` takes the published soft prompt
    that is nearest by function (`interpret/nearest_task.py`)."""
    init_text: str | None = None
    """The text for init text."""
    init_from: str | None = None
    """The soft prompt that `init=soft_prompt` starts from (SPoT, Vu et al. 2022): a PEFT directory for the command, a
    task for a job."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    evaluations: int = Field(default=10, ge=1)
    """Number of evaluations on the validation rows during the run; the best of the evaluated states is kept."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many consecutive evaluations without improvement; `None` disables early stopping."""
    teacher_template: str | None = None
    """Distil: learn the frozen model's own distributions behind this long text, which holds {input} once, instead of
    the targets of rows, which then need none."""
    teacher_chat: bool = False
    """Send the teacher's text as a user message, through the chat template."""
    labels: tuple[str, ...] | None = None
    """Distil the teacher's probabilities of these labels instead of its generated answers."""
    recompute: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward pass: a third slower, in a fraction of the memory."""

    @property
    def peft_type(self) -> str:
        """The PEFT type of the result; decides whether the model supports it."""
        return "PREFIX_TUNING" if self.method == "prefix_tuning" else "PROMPT_TUNING"

    @property
    def may_begin_as_teacher(self) -> bool:
        """Whether initial values come from the teacher where possible."""
        is_auto = self.init == "auto" and self.teacher_template is not None and self.method == "prefix_tuning"
        return is_auto or self.init == "teacher"

    def as_dict(self) -> dict[str, object]:
        """For the manifest: what is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@plain_dataclass(frozen=True)
class Contradiction:
    """A contradiction in a configuration: the field, by its name in a job's specification, and the remedy."""

    field: str
    message: str
    remedy: str


def contradiction(
    config: TrainingConfig, input_template: str, system_message: SystemMessage | None = None
) -> Contradiction | None:
    """Return the first contradiction in the configuration, or None. Independent of data and model."""
    if input_template.count(INPUT_FIELD) != 1:
        shown = input_template[:SHOWN]
        message = f"The input template {shown!r} does not hold {INPUT_FIELD} exactly once."
        return Contradiction("input_template", message, PLACE)
    if system_message == "template" and input_template.count(SYSTEM_FIELD) != 1:
        message = f"System messages are for the template, which does not hold {SYSTEM_FIELD} exactly once."
        return Contradiction("system_message", message, f"Put {SYSTEM_FIELD} where the system message belongs.")
    return _wrong_teacher(config) or _wrong_start(config)


def _wrong_teacher(config: TrainingConfig) -> Contradiction | None:
    teacher, labels = config.teacher_template, config.labels
    if teacher is not None and teacher.count(INPUT_FIELD) != 1:
        message = f"The teacher's text does not hold {INPUT_FIELD} exactly once."
        return Contradiction("config.teacher_template", message, PLACE)
    if config.teacher_chat and teacher is None:
        return Contradiction("config.teacher_chat", "There is no teacher's text to send.", "Give one, or leave it out.")
    if labels is None:
        return None
    if teacher is None:
        message = "Labels are named for distillation only; otherwise they are the targets of the rows."
        return Contradiction("config.labels", message, "Leave them out, or give a teacher's text.")
    if len(set(labels)) < len(labels) or len(labels) < 2 or not all(map(str.strip, labels)):
        message = f"The labels are not at least two different ones: {', '.join(map(repr, labels))[:SHOWN]}."
        return Contradiction("config.labels", message, "Name every label that the teacher may answer, each once.")
    return None


def _wrong_start(config: TrainingConfig) -> Contradiction | None:
    has_text = bool((config.init_text or "").strip())
    if (config.init == "text") != has_text:
        return Contradiction(
            "config.init_text",
            f"init is {config.init!r}, and there is {'a' if has_text else 'no'} text to begin with.",
            "Give init 'text' and --init-text (of a job: init_text) together, or neither.",
        )
    if (config.init == "soft_prompt") != bool(config.init_from):
        return Contradiction(
            "config.init_from",
            f"init is {config.init!r}, and there is {'a' if config.init_from else 'no'} soft prompt to begin with.",
            "Give init 'soft_prompt' and --init-from (of a job: init_from, a task) together, or neither.",
        )
    if config.init == "teacher" and (config.teacher_template is None or config.method != "prefix_tuning"):
        message = "Only prefix tuning begins with a teacher, whose text it needs."
        return Contradiction("config.init", message, "Give a teacher's text and method prefix_tuning, or another init.")
    if config.init == NEAREST_TASK and config.method == "multitask_prompt_tuning":
        message = "Several tasks have no one nearest task."
        return Contradiction("config.init", message, "Train one task, or use another init.")
    if config.init == "random" and config.method == "prefix_tuning":
        message = "Random keys and values train badly, so prefix tuning does not begin with them."
        return Contradiction("config.init", message, "Use init vocab, labels or text.")
    return None
