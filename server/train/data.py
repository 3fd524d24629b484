"""Training and evaluation data: JSONL with two strings a line, `input` and `target`.

Bad data is refused before any step is run, by file and line, because a run that fails after an hour costs an hour.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from server.contracts import TemplatedText
from server.errors import InvalidRequest, InvalidTrainingData
from server.soft_prompts.manifest import Manifest
from server.train.rows import Row, Rows

if TYPE_CHECKING:  # torch is not needed to read and check rows
    from server.engine.model.frozen import FrozenModel

MAX_ROWS = 500_000
MAX_LINE_BYTES = 2**20
READ_BYTES = 2**20
"""What is read of a file at a time. Each read releases Python's GIL and takes it back at once, which restarts the wait
of other threads: with 8 KiB reads, a file of empty lines blocked the event loop for a second."""
MAX_ROWS_BYTES = 512 * 2**20
"""Memory that a file's rows may take; a text with one character beyond Latin-1 takes twice or four times its length."""
REPEATED = 3
"""Targets are treated as labels if each occurs at least this often on average."""
FRAME = 8
"""Special tokens that a tokenizer may put around a text, at most."""


class Encode(Protocol):
    """A tokenizer's."""

    def __call__(self, text: str | TemplatedText, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""


class CanFit(Protocol):
    """Quick check, without tokenising, whether the texts together can fit the context."""

    def __call__(self, *texts: str) -> bool:
        """False for texts that can never fit."""


def always(*_: str) -> bool:
    """Any texts may fit: they have to be tokenised."""
    return True


@dataclass(frozen=True)
class DataFile:
    """A data file's rows, and the hash that says which data it was."""

    path: Path
    rows: Sequence[Row]
    sha256: str

    def first(self, limit: int | None) -> DataFile:
        """The same file with its first rows only; all of them without a limit."""
        return replace(self, rows=self.rows[:limit])


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it after the virtual tokens: templated input, then the target with its end token."""

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    task: int = 0
    """The task's index, if several tasks are trained together."""

    @property
    def fed_ids(self) -> tuple[int, ...]:
        """Token ids that are fed: the last target token is only predicted."""
        return self.input_ids + self.target_ids[:-1]


def read_data(path: Path, *, need_targets: bool = True, check_cancelled: Callable[[], None] = lambda: None) -> DataFile:
    """Read a whole data file.

    Args:
        need_targets: whether targets are required. Distillation ignores them; a missing target is stored as a dash.
        check_cancelled: called before each line; if it raises, the reading ends.

    Raises:
        InvalidTrainingData: the file is missing, empty or too long, or a line is not what it must be; names file and
            line.
    """
    rows = Rows()
    held = 0
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=READ_BYTES) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                check_cancelled()
                digest.update(line)
                if len(rows) == MAX_ROWS or len(line) > MAX_LINE_BYTES:
                    raise _too_long(path, number, len(line))
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    row = _parse_row(path, number, text, need_targets=need_targets)
                    rows.append(row)
                    held += sys.getsizeof(row.input) + sys.getsizeof(row.target)
                    if held > MAX_ROWS_BYTES:
                        raise _too_much(path, number)
    except OSError as exc:
        raise InvalidTrainingData(f"{path} cannot be read: {exc.strerror}.", remedy="Check the path.") from exc
    if not rows:
        raise InvalidTrainingData(
            f"{path} holds no rows.", remedy='Write one JSON object on each line: {"input": "…", "target": "…"}.'
        )
    return DataFile(path, rows, digest.hexdigest())


def _too_much(path: Path, number: int) -> InvalidTrainingData:
    return InvalidTrainingData(
        f"{path}, line {number}: the rows up to here take more than {MAX_ROWS_BYTES:,} bytes of memory.",
        remedy="Take a sample of the rows.",
    )


def _too_long(path: Path, number: int, length: int) -> InvalidTrainingData:
    if length > MAX_LINE_BYTES:
        return InvalidTrainingData(
            f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes.", remedy="Write one row on each line."
        )
    return InvalidTrainingData(
        f"{path}, line {number}: more than {MAX_ROWS:,} rows.",
        remedy="Take a sample: a run of 1,000 steps of 16 rows reads 16,000 of them.",
    )


def _parse_row(path: Path, number: int, line: bytes, *, need_targets: bool) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidTrainingData(f"{path}, line {number}: not UTF-8.", remedy="Save the file as UTF-8.") from exc
    except (ValueError, RecursionError) as exc:
        raise InvalidTrainingData(f"{path}, line {number}: not JSON ({exc}).") from exc
    fields = value if isinstance(value, dict) else {}
    if not need_targets:
        fields = {"target": "-"} | fields
    for name in ("input", "target"):
        if not isinstance(fields.get(name), str):
            raise InvalidTrainingData(f"{path}, line {number}: no string field {name!r}.")
        if not fields[name].strip():
            raise InvalidTrainingData(f"{path}, line {number}: {name!r} is empty.")
        if not fields[name].isprintable() and any("\ud800" <= character <= "\udfff" for character in fields[name]):
            raise InvalidTrainingData(f"{path}, line {number}: {name!r} holds half of a surrogate pair.")
    return Row(fields["input"], fields["target"], number)


def encode_examples(data: DataFile, model: FrozenModel, manifest: Manifest, num_virtual_tokens: int) -> list[Example]:
    """Tokenise rows exactly as serving will: the templated input alone, then the target, then the end token.

    The InvalidTrainingData for a row that does not fit the context, or holds a token that the model has no embedding
    for, names file and line.
    """
    eos = () if model.text.end_token_id is None else (model.text.end_token_id,)
    examples = []
    for row in data.rows:
        try:
            target_ids = model.text.encode(row.target, add_special_tokens=False)
            example = Example(tuple(model.text.encode(manifest.render(row.input))), (*target_ids, *eos))
        except InvalidRequest as exc:
            raise InvalidTrainingData(f"{data.path}, line {row.line}: {exc.message}", remedy=exc.remedy) from exc
        _check_length(data, row, len(example.fed_ids), num_virtual_tokens, model.spec.max_model_len)
        examples.append(example)
    return examples


def check_lengths(
    data: DataFile,
    manifest: Manifest,
    num_virtual_tokens: int,
    encode: Encode,
    max_model_len: int,
    *,
    can_fit: CanFit = always,
    check_cancelled: Callable[[], None] = lambda: None,
) -> None:
    """Refuse the rows that `encode_examples` would refuse, without the model.

    A token covers at least one byte, so only long rows need to be tokenised. `check_cancelled` is called before each
    row; if it raises, the check ends. The InvalidTrainingData names file and line, and both lengths.
    """
    for row in data.rows:
        check_cancelled()
        if not can_fit(row.input, row.target):
            raise InvalidTrainingData(
                f"{data.path}, line {row.line}: {len(row.input) + len(row.target):,} characters "
                "can never fit the context.",
                remedy="Shorten or leave out the row, or raise PRELUDE_MAX_MODEL_LEN.",
            )
        text = manifest.render(row.input)
        if num_virtual_tokens + len(text.text.encode()) + len(row.target.encode()) + FRAME > max_model_len:
            length = len(encode(text)) + len(encode(row.target, add_special_tokens=False))
            _check_length(data, row, length, num_virtual_tokens, max_model_len)


def _check_length(data: DataFile, row: Row, length: int, num_virtual_tokens: int, max_model_len: int) -> None:
    if num_virtual_tokens + length > max_model_len:
        raise InvalidTrainingData(
            f"{data.path}, line {row.line}: {num_virtual_tokens + length} tokens with the {num_virtual_tokens} virtual "
            f"ones; the context holds {max_model_len}.",
            remedy="Shorten or leave out the row, or raise PRELUDE_MAX_MODEL_LEN.",
        )


def hold_out(data: DataFile, share: float = 0.1, most: int = 500, seed: int = 0) -> tuple[DataFile, DataFile]:
    """Split a file's rows into those to train on and those to measure on; rows of one input stay together.

    Raises InvalidTrainingData if it has one input only.
    """
    inputs = list(dict.fromkeys(row.input for row in data.rows))
    if len(inputs) < 2:
        raise InvalidTrainingData(
            f"{data.path} holds one input only, so none can be held out to measure on.",
            remedy="Give more rows, some hundreds are usual; or validation rows of their own.",
        )
    random.Random(seed).shuffle(inputs)
    held = set(inputs[: max(1, min(most, round(len(inputs) * share)))])
    kept = Rows(row for row in data.rows if row.input not in held)
    return replace(data, rows=kept), replace(data, rows=Rows(row for row in data.rows if row.input in held))


def check_rows(training: DataFile, validation: DataFile, labels: Sequence[str] | None) -> None:
    """Refuse data that would train but teach nothing, or that cannot be evaluated.

    Raises InvalidTrainingData for a single row, or a label to be measured on that no row teaches.
    """
    if len(training.rows) < 2:
        raise InvalidTrainingData(
            f"{training.path}, line {training.rows[0].line}: the only row, and a soft prompt would memorise it.",
            remedy="Give more rows; some hundreds are usual.",
        )
    for row in validation.rows if labels else ():
        if row.target not in (labels or ()):
            raise InvalidTrainingData(
                f"{validation.path}, line {row.line}: the label {row.target[:80]!r} is on no row of {training.path}.",
                remedy=f"Mend it, or add rows that teach it. The labels are {', '.join(labels or ())[:200]}.",
            )


def labels_of(rows: Sequence[Row], most: int = 100) -> tuple[str, ...] | None:
    """The distinct targets, sorted, where there are few enough, and often enough repeated, to be class labels."""
    most = min(most, max(1, len(rows) // REPEATED))
    targets: set[str] = set()
    for row in rows:
        targets.add(row.target)
        if len(targets) > most:  # sorting half a million values would hold the GIL, and is not needed
            return None
    return tuple(sorted(targets))
