"""A job's record: one JSON line for each event, appended by its process, read by followers.

    {"event": "phase", "phase": "loading", "at": "…"}
    {"event": "tried", "learning_rate": 0.02, "loss": 1.3}
    {"event": "step", "step": 20, "steps": 600, "loss": 0.8, "validation": {"step": 20, "loss": …, "exact_match": …}, …}

Each step is recorded once: steps that a restarted process repeats from its checkpoint (with the same numbers) are not
recorded again. An incomplete last line is being written, or was when the process was killed; readers ignore it.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from server.jobs.job import JobProgress
from server.train.config import TrainingConfig

LINES = 1000
"""About this many steps of a long run are recorded, plus every evaluation."""
LONGEST_SILENCE = 5.0
"""Seconds after which a step is recorded in any case."""
TAIL_BYTES = 2**16


class Recorder:
    """Appends to a job's record; only its process does."""

    def __init__(self, path: Path, config: TrainingConfig) -> None:
        self._steps = config.steps
        self._every = max(1, config.steps // LINES)
        _cut_torn_line(path)
        lines = read_lines(path)[0]
        seen = [line for line in lines if line["event"] == "step"]
        self._last_step: int = seen[-1]["step"] if seen else 0
        self._validation: dict[str, Any] | None = seen[-1]["validation"] if seen else None
        self._tried = {line["learning_rate"] for line in lines if line["event"] == "tried"}
        self._file: IO[bytes] = path.open("ab")
        self._began: tuple[int, float] | None = None  # a step of this process, and when it was over
        self._written_at = time.monotonic()

    def phase(self, phase: str, at: str) -> None:
        """Record that a phase begins: loading, reading, learning_rate, teacher, training or writing."""
        self._write({"event": "phase", "phase": phase, "at": at})

    def tried(self, learning_rate: float, loss: float) -> None:
        """Record a tried learning rate; its loss is omitted if it was not finite."""
        if learning_rate not in self._tried:
            self._write({"event": "tried", "learning_rate": learning_rate, "loss": _finite(loss)})

    def step(self, step: int, loss: float, tokens_per_second: float, score: dict[str, float] | None) -> None:
        """A step of training, with what was measured after it."""
        now = time.monotonic()
        if self._began is None:
            self._began = (step, now)
        if step <= self._last_step:
            return
        if score is not None:
            self._validation = {"step": step, **{name: _finite(value) for name, value in score.items()}}
        is_due = step % self._every == 0 or step in (1, self._steps) or now - self._written_at > LONGEST_SILENCE
        if score is None and not is_due:
            return
        since, at = self._began
        left = None if step == since else round((now - at) / (step - since) * (self._steps - step), 1)
        self._last_step = step
        self._write(
            {
                "event": "step",
                "step": step,
                "steps": self._steps,
                "loss": _finite(loss),
                "tokens_per_second": round(tokens_per_second, 1),
                "seconds_left": left,
                "validation": self._validation,
            }
        )

    def close(self) -> None:
        """Nothing more will be recorded."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._written_at = time.monotonic()


def read_lines(path: Path, offset: int = 0, most: int = -1) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a record from an offset on, in at most `most` bytes, and the offset of the next ones."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(most)
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return _parsed(whole), offset + len(whole)


def last_line_end(path: Path) -> int:
    """Where the last whole line of a record ends; 0 if there is none."""
    begin, data = _tail(path)
    return begin + len(data)


def read_progress(path: Path) -> JobProgress:
    """How far a job has come, from the end of its record."""
    begin, data = _tail(path)
    lines = _parsed(data[data.find(b"\n") + 1 :] if begin else data)
    phase = next((line["phase"] for line in reversed(lines) if line["event"] == "phase"), "training" if lines else "")
    last = next((line for line in reversed(lines) if line["event"] == "step"), None)
    if last is None:
        return JobProgress(phase)
    is_ahead = lines[-1]["event"] != "step"  # a restarted process has not reached this step yet
    left = None if is_ahead else last["seconds_left"]
    return JobProgress(phase, last["step"], last["loss"], last["tokens_per_second"], left, last["validation"])


def _tail(path: Path) -> tuple[int, bytes]:
    """Where a record's last TAIL_BYTES begin, and these up to the end of the last whole line."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = file.seek(max(0, size - TAIL_BYTES))
            data = file.read(size - begin)
    except FileNotFoundError:
        return 0, b""
    return begin, data[: data.rfind(b"\n") + 1]


def _parsed(lines: bytes) -> list[dict[str, Any]]:
    """The events of whole lines; a line that is none, which a broken disk may leave, counts for nothing."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "event" in value:
                found.append(value)
    return found


def count_steps(path: Path) -> int:
    """Number of steps in a record; shows whether a process got further than the previous one."""
    return sum(line["event"] == "step" for line in read_lines(path)[0])


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return round(value, 6) if abs(value) < float("inf") else None
