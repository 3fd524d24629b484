"""Data of an evaluation: rows, the references of their answers, and what their folder declares.

Beside `test.jsonl` may lie `test.references.jsonl`, whose line n is `{"references": ["…", …]}` for line n of the data,
and `meta.json`, whose `instruction` says in words what the task is. Both files are used automatically.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.errors import InvalidTrainingData
from server.train.data import MAX_LINE_BYTES, READ_BYTES, DataFile, labels_of, read_data
from server.train.rows import Row

META = "meta.json"
REFERENCES = ".references.jsonl"
REFERENCE_LINE = 'Each line must be a JSON object with a list of strings: {"references": ["…"]}.'

MOST_REFERENCES, MOST_REFERENCE_CHARACTERS = 100, 100_000
"""Of a row; an answer is compared with each, word by word."""
MOST_BLANK_LINES = 1000
"""Maximum number of blank lines after the last row."""


@dataclass(frozen=True)
class EvaluationData:
    """The rows of a data file and of the files beside it."""

    name: str
    """The file's name in errors and reports."""
    rows: Sequence[Row]
    references: tuple[tuple[str, ...], ...]
    """The right answers of each row; its target if there are no references."""
    sha256: str
    """Hash of the whole file, rows beyond the limit included."""
    labels: tuple[str, ...] | None = None
    """The file's distinct targets, if they look like classes."""
    instruction: str | None = None

    @property
    def is_single_line(self) -> bool:
        """Whether every target is one line; if so, only the first line of an answer counts."""
        return not any("\n" in row.target.strip() for row in self.rows)


def read_evaluation_data(
    path: Path,
    *,
    references: Path | None = None,
    references_name: str | None = None,
    limit: int | None = None,
    name: str | None = None,
    inside: Path | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> EvaluationData:
    """Read and check a data file and the files beside it.

    Args:
        references: file of references, instead of the one beside the data.
        references_name: its name in errors.
        name: the name for errors and reports, if the path is not to be shown.
        inside: files beside the data are read only if they lie in this folder, symbolic links resolved.
        check_cancelled: called before each line; if it raises, the reading ends.

    Raises:
        InvalidTrainingData: a file or a line is invalid; names both.
    """
    whole = read_rows(path, name, check_cancelled)
    beside = path.with_name(path.name.removesuffix(".jsonl") + REFERENCES)
    found = references or (beside if _may_read(beside, inside) else None)
    shown = references_name or (found.name if name and found else None)
    texts = None if found is None else _read_references(found, whole, limit, shown, check_cancelled)
    rows = whole.rows[:limit]
    return EvaluationData(
        str(whole.path),
        rows,
        tuple((row.target,) if texts is None else texts[row.line] for row in rows),
        whole.sha256,
        labels_of(whole.rows),
        _instruction(path.parent / META) if _may_read(path.parent / META, inside) else None,
    )


def _may_read(path: Path, inside: Path | None) -> bool:
    """Whether the file exists and, with links resolved, lies in the expected folder."""
    return path.exists() and (inside is None or path.resolve().is_relative_to(inside.resolve()))


def read_rows(path: Path, name: str | None = None, check_cancelled: Callable[[], None] = lambda: None) -> DataFile:
    """Read a data file, which errors (InvalidTrainingData) call by `name`. Calls `check_cancelled` before each line."""
    if name is None:
        return read_data(path, check_cancelled=check_cancelled)
    try:
        return replace(read_data(path, check_cancelled=check_cancelled), path=Path(name))
    except InvalidTrainingData as exc:
        raise InvalidTrainingData(exc.message.replace(str(path), name), remedy=exc.remedy) from exc


def _read_references(
    path: Path, data: DataFile, limit: int | None, name: str | None, check_cancelled: Callable[[], None]
) -> dict[int, tuple[str, ...]]:
    """Line number -> references, of the first rows up to the limit."""
    shown = name or str(path)
    places = {row.line: place for place, row in enumerate(data.rows)}
    texts: dict[int, tuple[str, ...]] = {}
    try:
        with path.open("rb", buffering=READ_BYTES) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                check_cancelled()
                if len(line) > MAX_LINE_BYTES:
                    raise InvalidTrainingData(
                        f"{shown}, line {number}: longer than {MAX_LINE_BYTES:,} bytes.", remedy=REFERENCE_LINE
                    )
                if not line.strip():
                    if number > data.rows[-1].line + MOST_BLANK_LINES:
                        raise _not_line_by_line(shown, data, str(data.path), number)
                    continue
                if (place := places.pop(number, None)) is None:
                    raise _not_line_by_line(shown, data, str(data.path), number)
                found = _parse(shown, number, line)
                if limit is None or place < limit:
                    texts[number] = found
    except OSError as exc:
        raise InvalidTrainingData(f"{shown} cannot be read: {exc.strerror}.", remedy="Check the path.") from exc
    if places:
        raise _not_line_by_line(shown, data, shown, min(places))
    return texts


def _not_line_by_line(shown: str, data: DataFile, lacking: str, number: int) -> InvalidTrainingData:
    return InvalidTrainingData(
        f"{shown} does not match {data.path} line by line: {lacking} has no line {number}.",
        remedy="Give references for every row, on the row's own line.",
    )


def _parse(shown: str, number: int, line: bytes) -> tuple[str, ...]:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidTrainingData(f"{shown} cannot be read: not UTF-8.", remedy="Save the file as UTF-8.") from exc
    except (ValueError, RecursionError) as exc:
        raise InvalidTrainingData(f"{shown}, line {number}: not JSON ({exc}).", remedy=REFERENCE_LINE) from exc
    texts = value.get("references") if isinstance(value, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InvalidTrainingData(
            f"{shown}, line {number}: no list 'references' of strings that are not empty.", remedy=REFERENCE_LINE
        )
    if len(texts) > MOST_REFERENCES or sum(map(len, texts)) > MOST_REFERENCE_CHARACTERS:
        raise InvalidTrainingData(
            f"{shown}, line {number}: {len(texts):,} references of {sum(map(len, texts)):,} characters.",
            remedy=f"Give at most {MOST_REFERENCES} a line, of {MOST_REFERENCE_CHARACTERS:,} characters in all.",
        )
    return tuple(texts)


def _instruction(meta: Path) -> str | None:
    """The instruction from the folder's meta.json; None if that file is missing or has another format."""
    try:
        value: Any = json.loads(meta.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    text = value.get("instruction") if isinstance(value, dict) else None
    return text if isinstance(text, str) and text.strip() else None
