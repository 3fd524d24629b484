"""The card: what a soft prompt is, how good it is and how that was measured, as Markdown for its directory.

In a README.md the card stands between two marks. What people write around them stays when it is written again.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.durable import replace_file
from server.errors import ConfigurationError
from server.evaluation.intervals import RESAMPLES
from server.evaluation.report import Report, written_estimate
from server.evaluation.systems import INSTRUCTION, TEACHER, ZERO_SHOT
from server.soft_prompts.formats import MANIFEST_FILE
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import START_FIELD

CARD_FILE = "README.md"
BEGIN, END = "<!-- prelude eval: card -->", "<!-- prelude eval: end of card -->"
LONG_VALUE = 200
MOST_LABELS = 32
"""A card has a table of labels only if there are at most this many."""

WAYS = {
    ZERO_SHOT: "the frozen model continues the input in the task's own template, without the virtual tokens",
    INSTRUCTION: "the frozen model reads the instruction, an empty line and the input, as a chat",
    TEACHER: "the frozen model continues the long text that the soft prompt stands for",
}


def render_card(report: Report, soft_prompt: SoftPrompt, command: str, interpretation: str | None = None) -> str:
    """The card of a report on a soft prompt; `command` reproduces the measurement.

    `interpretation` is a section in Markdown.
    """
    manifest = soft_prompt.manifest
    parts = [f"# {report.about.task}", *_about(report, soft_prompt), "## Measured", *_measured(report)]
    parts += [f"    PRELUDE_DTYPE={report.about.dtype} {command}"]
    if interpretation is not None:
        parts.append(interpretation)
    if manifest.training:
        rows = [[name, _value(value)] for name, value in manifest.training.items() if name != START_FIELD]
        parts += ["## Trained", _table(["", ""], rows)]
    if manifest.licence:
        parts += ["## Licence", manifest.licence]
    return "\n\n".join(parts) + "\n"


def eval_command(task: str, options: Mapping[str, object]) -> str:
    """The shell command of an evaluation; options that are not set are left out."""
    words = ["prelude", "eval", task]
    for option, value in options.items():
        if value:
            values = () if value is True else value if isinstance(value, list | tuple) else (value,)
            words += [option, *map(str, values)]
    return shlex.join(words)


def write_card(directory: Path, card: str) -> Path:
    """Write the card to README.md: create it, or replace the part between the marks. Raises ConfigurationError."""
    path = directory / CARD_FILE
    check_card(directory)
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
        before, _, rest = old.partition(BEGIN)
        replace_file(path, f"{before}{BEGIN}\n{card}{END}{rest.partition(END)[2]}".encode())
    except (OSError, UnicodeDecodeError) as exc:
        raise _not_written(path, exc) from exc
    return path


def check_card(directory: Path) -> None:
    """Raise ConfigurationError if there is no such directory, or a README.md without the marks in it."""
    path = directory / CARD_FILE
    if not directory.is_dir():
        raise ConfigurationError(
            f"There is no directory {directory} to write a card into.",
            remedy="Name the soft prompt's directory with --soft-prompt.",
        )
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}{END}"
    except (OSError, UnicodeDecodeError) as exc:
        raise _not_written(path, exc) from exc
    if not (0 <= old.find(BEGIN) < old.find(END)):
        raise ConfigurationError(
            f"{path} was not written by `prelude eval`, and would be lost.",
            remedy=f"Write the lines {BEGIN} and {END} into it where the card belongs, or move it away.",
        )


def write_metrics(directory: Path, report: Report) -> None:
    """Write the figures to the metrics of manifest.json, as `test_…`; raises InvalidSoftPrompt, ConfigurationError."""
    path = directory / MANIFEST_FILE
    try:
        manifest = Manifest.parse(path.read_bytes()) if path.exists() else Manifest()
        kept = {name: value for name, value in (manifest.metrics or {}).items() if not name.startswith("test_")}
        manifest = manifest.model_copy(update={"metrics": {**kept, **_metrics(report)}})
        replace_file(path, manifest.to_json().encode())
    except OSError as exc:
        raise _not_written(path, exc) from exc


def _metrics(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric, estimate in report.scores[report.about.name].figures.items():
        found[f"test_{metric.key}"] = round(estimate.value, 4)
        found[f"test_{metric.key}_interval"] = [round(estimate.low, 4), round(estimate.high, 4)]
    return {**found, "test_rows": report.about.rows, "test_sha256": report.about.data_sha256}


def _not_written(path: Path, error: OSError | UnicodeDecodeError) -> ConfigurationError:
    why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    return ConfigurationError(
        f"{path} cannot be written: {why}.", remedy="Let --soft-prompt name a directory that can be written to."
    )


def _about(report: Report, soft_prompt: SoftPrompt) -> Iterable[str]:
    if soft_prompt.manifest.description:
        yield soft_prompt.manifest.description
    about = report.about
    kind = soft_prompt.peft_type.lower().replace("_", " ")
    version = f" Version {about.version}." if about.version else ""
    yield f"A soft prompt of {soft_prompt.num_virtual_tokens} virtual tokens ({kind}) for {about.model}.{version}"
    if about.labels and len(about.labels) <= MOST_LABELS:
        yield "The answer is one of " + ", ".join(f"`{label}`" for label in about.labels) + "."


def _measured(report: Report) -> Iterable[str]:
    about, metrics = report.about, report.metrics
    yield (
        f"On {about.rows:,} rows of `{about.data}` (sha256 `{about.data_sha256[:12]}…`), through the served path, in "
        f"{about.dtype}. In brackets: 95 % intervals, by {RESAMPLES:,} bootstrap resamples of the rows."
    )
    if report.warning:
        yield f"**{report.warning}**"
    yield _table(
        ["", *(metric.title for metric in metrics)],
        [
            [f"**{name}**" if name == about.name else name]
            + ["{} ({})".format(*written_estimate(metric, score.figures[metric])) for metric in metrics]
            for name, score in report.scores.items()
        ],
    )
    if report.differences:
        sentences = [report.sentence(other) for other in report.differences]
        sentences += [report.agreement_sentence(TEACHER)] if TEACHER in report.agreement else []
        yield "\n".join(f"- {sentence}" for sentence in sentences)
    yield "\n".join(_notes(report))
    if report.by_label and len(report.by_label) <= MOST_LABELS:
        rows = [[f"`{label}`", f"{right} of {rows}"] for label, (right, rows) in report.by_label.items()]
        yield _table(["label", "right, by choosing"], rows)


def _notes(report: Report) -> Iterable[str]:
    if report.about.labels:
        yield (
            "- *accuracy* and *macro-F1*: the likeliest label, as `choices` scores them. *Generated*: what is written "
            "without being held to the labels."
        )
    else:
        yield (
            "- *ROUGE-L*: F-measure with stemming, the best over a row's references. *BLEU*: sacrebleu's, of the whole "
            "corpus. *Perplexity*: of the target's tokens and its end."
        )
    alone = [name for name in report.differences if "@" not in name]
    for name in alone:
        given = "the instruction, " if report.about.instruction else ""
        way = WAYS.get(name, f"the frozen model continues a plain text of {given}examples and the input")
        yield f"- *{name}*: {way}."
    if alone:
        yield (
            "- Of the frozen model's generated answers the first line counts, whatever its case and the punctuation "
            "around it; the soft prompt must match exactly."
        )
    if report.about.instruction:
        yield f"- The instruction: “{' '.join(report.about.instruction.split())}”"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    text = str(value)
    if len(text) > LONG_VALUE:
        return f"{text[:LONG_VALUE]}… ({len(text):,} characters, all of them in {MANIFEST_FILE})"
    return f"`{text[:12]}…`" if len(text) == 64 and text.isalnum() else text
