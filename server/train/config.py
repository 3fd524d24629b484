"""What a training run can be told: the same fields for `prelude train`, a training job and the manifest.

The defaults are meant to work unseen: the learning rate is looked for by a short sweep, training stops once the
validation rows get no better, and the first virtual tokens are what Lester et al. 2021 found to be best.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Method = Literal["prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning"]
Init = Literal["auto", "labels", "text", "vocab", "soft_prompt", "random"]

HIGHEST_LEARNING_RATE = 1e6
"""Beyond it a step leaves the range of float32, and nothing could be learned long before."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingConfig:
    """Hyperparameters."""

    method: Method = "prompt_tuning"
    """prompt_tuning (Lester et al. 2021), p_tuning (Liu et al. 2021; an MLP makes the vectors, and is not kept),
    prefix_tuning (Li and Liang 2021; keys and values of every layer), multitask_prompt_tuning (Wang et al. 2023)."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    steps: int = Field(default=600, ge=1, le=10_000_000)
    batch_size: int = Field(default=16, ge=1, le=4096)
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=HIGHEST_LEARNING_RATE)] = "auto"
    """The peak; auto tries a few for some steps each and takes the best."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    init: Init = "auto"
    """First values. auto: class labels where there are some, else sampled vocabulary."""
    init_text: str | None = None
    """The text for init text."""
    init_from: str | None = None
    """A PEFT directory for init soft_prompt (SPoT, Vu et al. 2022)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    evaluations: int = Field(default=10, ge=1)
    """How often the validation rows are measured on the way; the best of these states is kept."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many measurements in a row that are no better than the best; none never stops early."""
    teacher_template: str | None = None
    """Distil: learn the frozen model's own distributions behind this long text, which holds {input} once, instead of
    the targets of rows, which then need none."""
    teacher_chat: bool = False
    """Send the teacher's text as a user message, through the chat template."""
    labels: tuple[str, ...] | None = None
    """Distil what the teacher thinks of these labels, instead of what it answers."""
    recompute: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward pass: a third slower, in a fraction of the memory."""

    def as_dict(self) -> dict[str, object]:
        """For the manifest: what is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}
