"""Training and evaluation data: JSONL with two strings a line, `input` and `target`.

Bad data is refused before any step is run, by file and line, because a run that fails after an hour costs an hour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from server.engine.model import FrozenModel
from server.errors import InvalidTrainingData
from server.soft_prompts.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data file."""

    input: str
    target: str
    line: int


@dataclass(frozen=True)
class DataFile:
    """A data file's rows, and the hash that says which data it was."""

    path: Path
    rows: tuple[Row, ...]
    sha256: str

    def first(self, limit: int | None) -> DataFile:
        """The same file with its first rows only; all of them without a limit."""
        return replace(self, rows=self.rows[:limit])


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it behind the virtual tokens: templated input, then the target with its end token."""

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def fed_ids(self) -> tuple[int, ...]:
        """Token ids that are fed: the last target token is only predicted."""
        return self.input_ids + self.target_ids[:-1]


def read_data(path: Path) -> DataFile:
    """Read a whole data file.

    Raises:
        InvalidTrainingData: the file is missing or empty, or a line is not what it must be; names file and line.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise InvalidTrainingData(f"{path} cannot be read: {exc.strerror}.", remedy="Check the path.") from exc
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        raise InvalidTrainingData(f"{path}, line {line}: not UTF-8.", remedy="Save the file as UTF-8.") from exc
    rows = tuple(_parse_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not rows:
        raise InvalidTrainingData(f"{path} holds no rows.")
    return DataFile(path, rows, hashlib.sha256(data).hexdigest())


def _parse_row(path: Path, number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise InvalidTrainingData(f"{path}, line {number}: not JSON ({exc}).") from exc
    fields = value if isinstance(value, dict) else {}
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

    Raises:
        InvalidTrainingData: a row does not fit the context; names file and line, and both lengths.
    """
    eos = (min(model.eos_token_ids),) if model.eos_token_ids else ()
    examples = []
    for row in data.rows:
        target_ids = model.tokenizer.encode(row.target, add_special_tokens=False)
        example = Example(tuple(model.encode(manifest.render(row.input))), (*target_ids, *eos))
        length = num_virtual_tokens + len(example.fed_ids)
        if length > model.spec.max_model_len:
            raise InvalidTrainingData(
                f"{data.path}, line {row.line}: {length} tokens with the {num_virtual_tokens} virtual ones; "
                f"the context holds {model.spec.max_model_len}.",
                remedy="Shorten or leave out the row, or raise PRELUDE_MAX_MODEL_LEN.",
            )
        examples.append(example)
    return examples


def labels_of(rows: Sequence[Row], most: int = 100) -> tuple[str, ...] | None:
    """The distinct targets, sorted, where there are few enough, and often enough repeated, to be class labels."""
    targets = sorted({row.target for row in rows})
    return tuple(targets) if len(targets) <= min(most, max(1, len(rows) // 5)) else None
