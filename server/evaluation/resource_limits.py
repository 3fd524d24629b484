"""Limits of an evaluation beside live traffic: its memory, its time, its share of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import InvalidTrainingData
from server.evaluation.data import EvaluationData
from server.evaluation.systems import System

REMEDY = "Set `limit`, or send a sample of the rows; `prelude eval` takes any number."


@dataclass(frozen=True)
class EvaluationBounds:
    """Upper limits of one evaluation."""

    rows: int = 20_000
    stored_characters: int = 32 * 2**20
    """Characters of rows and references, which are in memory until the evaluation ends."""
    read_characters: int = 256 * 2**20
    """Characters of all systems' inputs, which are tokenised before the first request."""
    cells: int = 4_000_000
    """Rows times labels: the size of the matrix that is resampled."""
    labels_at_once: int = 64
    """Labels that one request scores."""

    def check_rows(self, data: EvaluationData, num_labels: int) -> None:
        """Refuse (InvalidTrainingData) too many rows, or too much text in them."""
        rows = len(data.rows)
        _refuse_over(data, f"{rows:,} rows", rows, self.rows)
        _refuse_over(data, f"{rows:,} rows of {num_labels:,} labels", rows * num_labels, self.cells)
        stored = _characters(data) + sum(len(text) for several in data.references for text in several)
        _refuse_over(data, f"{stored:,} characters of rows and references", stored, self.stored_characters)

    def check_reading(self, data: EvaluationData, systems: Sequence[System]) -> None:
        """Refuse (InvalidTrainingData) what takes too long to tokenise."""
        around = sum(len(one.preamble) + len(one.template.input_template or "") for one in systems)
        read = len(systems) * _characters(data) + len(data.rows) * around
        what = f"{read:,} characters to read, instructions and examples included,"
        _refuse_over(data, what, read, self.read_characters)


def _characters(data: EvaluationData) -> int:
    return sum(len(row.input) + len(row.target) for row in data.rows)


def _refuse_over(data: EvaluationData, what: str, amount: int, most: int) -> None:
    if amount > most:
        raise InvalidTrainingData(f"{data.name}: {what} are more than the server's {most:,}.", remedy=REMEDY)
