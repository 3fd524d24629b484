"""The files that a run writes: a PEFT directory, and the course of the run as figures and as a picture."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from server.contracts import ModelSpec
from server.durable import sync
from server.errors import ConfigurationError
from server.soft_prompts.declared import MULTITASK
from server.soft_prompts.formats import save_multitask, save_soft_prompt
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.run_history import TrainingResult

METRICS_FILE = "metrics.json"
CURVE_FILE = "loss.svg"


@dataclass(frozen=True)
class Trained:
    """What was learned, and what is said about it."""

    peft_type: str
    result: TrainingResult
    manifest: Manifest
    checkpoint: Path | None = None
    """The checkpoint folder; can be deleted once the result is written."""

    @property
    def soft_prompt(self) -> SoftPrompt:
        """The soft prompt with its manifest, completed with both hashes; for several tasks, the shared part."""
        kind = "PROMPT_TUNING" if self.peft_type == MULTITASK else self.peft_type
        unnamed = SoftPrompt(kind, self.result.prompt_embeddings, self.manifest)
        identities = {"digest": unnamed.digest, "prefix_hash": unnamed.prefix_hash}
        return SoftPrompt(kind, unnamed.tensor, self.manifest.model_copy(update=identities))


def check_writable(directory: Path) -> None:
    """Check before training that `write_task` can write the directory; raises ConfigurationError if not."""
    try:
        for wanted in (directory, directory.parent):
            nearest = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as exc:
        raise ConfigurationError(
            f"The soft prompt cannot be written to {directory}: {exc.strerror}.",
            remedy="Let --out name a folder that can be written to.",
        ) from exc


def write_task(directory: Path, trained: Trained, model: ModelSpec) -> None:
    """Write the PEFT directory's files to a temporary directory, then move them in durably, the tensor last."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
    try:
        if trained.peft_type == MULTITASK:
            save_multitask(temporary, trained.result.tensors, trained.manifest, model)
        else:
            save_soft_prompt(temporary, trained.soft_prompt, model)
        _write_course(temporary, trained)
        for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            sync(file)
            os.replace(file, directory / file.name)
        sync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_course(directory: Path, trained: Trained) -> None:
    course = {
        "best_step": trained.result.step,
        "history": [asdict(measured) for measured in trained.result.history],
        "metrics": trained.manifest.metrics,
    }
    text = json.dumps(course, indent=2, sort_keys=True) + "\n"
    (directory / METRICS_FILE).write_text(text, encoding="utf-8")
    draw_course(directory / CURVE_FILE, trained)


def draw_course(path: Path, trained: Trained) -> None:
    """Draw losses and the share of right answers over the steps; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError:
        return
    history = trained.result.history
    steps = [measured.step for measured in history]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    losses = figure.subplots()
    marker = "o" if len(steps) < 30 else ""
    losses.plot(
        steps, [measured.training_loss for measured in history], color="0.7", marker=marker, label="training loss"
    )
    losses.plot(steps, [measured.score.loss for measured in history], marker=marker, label="validation loss")
    losses.set(xlabel="step", ylabel="loss, nats", title=trained.manifest.task or "")
    losses.set_ylim(bottom=0)
    right = losses.twinx()
    right.plot(
        steps,
        [measured.score.exact_match for measured in history],
        color="C1",
        marker="s" if marker else "",
        label="exact match",
    )
    right.set(ylabel="exact match on validation rows", ylim=(-0.02, 1.02))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.axvline(trained.result.step, color="0.5", linestyle=":", label="kept")
    lines = [*losses.get_lines(), *right.get_lines()]
    names = [str(line.get_label()) for line in lines]
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})
