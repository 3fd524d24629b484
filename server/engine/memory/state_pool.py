"""Recurrent states of running sequences: one row of a fixed size for each, beside its slot.

What a step computes becomes the state only when the step has succeeded, because one that ran out of memory runs again.
A row is zeroed when a sequence begins, so nothing of its last owner, NaN included, reaches the next one.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from server.contracts import ModelSpec
from server.engine.attention.interface import StateSlice
from server.engine.memory.slots import Slot


class StatePool:
    """The states of running sequences, by their slots: `states` is `[rows, state_width]`, in float32 or float64."""

    def __init__(self, model: ModelSpec, rows: int) -> None:
        self.states = torch.zeros(rows, model.state_width, dtype=state_dtype(model), device=model.device)
        self._free = list(range(rows))
        self._rows: dict[Slot, int] = {}
        self._computed: list[tuple[StateSlice, torch.Tensor, torch.Tensor]] = []

    @property
    def has_room(self) -> bool:
        """Whether another sequence may begin."""
        return bool(self._free)

    def allocate(self, slot: Slot) -> None:
        """Give a starting sequence a state of zeros."""
        self._rows[slot] = self._free.pop()
        self.of(slot).zero_()

    def release(self, slot: Slot) -> None:
        """Free the state of a sequence that has ended."""
        self._free.append(self._rows.pop(slot))

    def of(self, slot: Slot) -> torch.Tensor:
        """A sequence's state `[state_width]`, as it lies here."""
        return self.states[self._rows[slot]]

    def rows_of(self, slots: Iterable[Slot]) -> np.ndarray:
        """The rows of sequences."""
        return np.array([self._rows[slot] for slot in slots], dtype=np.int64)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager around a step: new states are stored if the step succeeds and discarded if it raises."""
        try:
            yield
            for state_slice, rows, states in self._computed:
                self._at(state_slice).index_copy_(0, rows, states)
        finally:
            self._computed.clear()

    def read(self, state_slice: StateSlice, rows: torch.Tensor) -> torch.Tensor:
        """A copy of a layer's states `[rows, width]`."""
        return self._at(state_slice).index_select(0, rows)

    def keep(self, state_slice: StateSlice, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Take a layer's states after a step; nobody reads them before the step has succeeded."""
        self._computed.append((state_slice, rows, states))

    def check_integrity(self, slots: Iterable[Slot]) -> None:
        """Assert that exactly the sequences of these slots have a state each."""
        assert self._rows.keys() == set(slots), "a state is left of a sequence that has ended, or one has none"
        assert sorted([*self._free, *self._rows.values()]) == list(range(len(self.states))), "a row is lost or doubled"

    def _at(self, state_slice: StateSlice) -> torch.Tensor:
        return self.states[:, state_slice.first : state_slice.first + state_slice.width]


def state_dtype(model: ModelSpec) -> torch.dtype:
    """The dtype of recurrent states: at least float32, because rounding errors would accumulate over a sequence."""
    return torch.float64 if model.dtype == "float64" else torch.float32


def bytes_per_state(model: ModelSpec) -> int:
    """Bytes of a sequence's recurrent state; 0 for models without."""
    return model.state_width * state_dtype(model).itemsize
