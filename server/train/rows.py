"""Rows of data files, kept as columns."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data file."""

    input: str
    target: str
    line: int


class Rows(Sequence[Row]):
    """Many rows, in three columns.

    Garbage collection stops all threads while it visits every container: 0.2 s for half a million row objects. Strings
    are not containers, so it visits only the three columns.
    """

    __slots__ = ("_inputs", "_lines", "_targets")

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._inputs: list[str] = []
        self._targets: list[str] = []
        self._lines = array("L")
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Add a row at the end."""
        self._inputs.append(row.input)
        self._targets.append(row.target)
        self._lines.append(row.line)

    def __len__(self) -> int:
        return len(self._inputs)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        """One row, or some of them."""
        if not isinstance(index, slice):
            return Row(self._inputs[index], self._targets[index], self._lines[index])
        some = Rows()
        some._inputs, some._targets = self._inputs[index], self._targets[index]
        some._lines = self._lines[index]
        return some

    def __iter__(self) -> Iterator[Row]:
        return map(Row, self._inputs, self._targets, self._lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # rows can be added
