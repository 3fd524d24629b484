"""Runs each stage as a separate process with a time limit, and always writes one line of JSON for it.

Uses only the standard library, because it must survive the stages' failures. A stage writes each figure to a file at
once, as a line of JSON, so a stage that hangs or dies leaves its figures so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAST_LINES = 12
"""Maximum number of lines of a stage's output in its reason."""
LEAST_SECONDS = 5.0
"""Minimum remaining time to start a stage."""
POLL_SECONDS = 0.02
REHEARSAL_SECONDS = 600.0
"""Time limit of each stage in a rehearsal, because importing torch takes minutes on a busy machine."""


@dataclass(frozen=True)
class Stage:
    """A stage and its time limit."""

    name: str
    seconds: float
    proves: str


STAGES = (
    Stage("machine", 20, "versions, flash attention's arguments, the rates of copies and products"),
    Stage("attention", 40, "flash attention keeps the contract that varlen_rows.py relies on"),
    Stage("graphs", 60, "captured graphs read nothing freed, and a capture that fails leaves no traces"),
    Stage("correctness", 60, "the tests that need CUDA; answers on CUDA beside those of a CPU in float32"),
    Stage("decode", 110, "an 8B model: memory after loading and at the peak, decoding to the roofline, eight tasks"),
    Stage("eager", 70, "where the time goes in steps that are not replayed, and in sampling"),
    Stage("http", 70, "tokens per second, cores and time to first token at 64 and 256 streams"),
    Stage("failures", 40, "no memory hurts one request; a lost device ends streams and process, and probes say so"),
    Stage("training", 50, "prompt tuning of an 8B model: tokens per second and memory, with and without recomputing"),
    Stage("peers", 20, "transformers' continuous batching, and soft prompts registered; takes all time that is left"),
)
"""Stages by importance, so that a shorter run measures what matters most."""

MINUTES = sum(stage.seconds for stage in STAGES) / 60


@dataclass
class Result:
    """The result of a stage.

    Attributes:
        status: "ok", "skipped" (see `reason`), "failed" (the stage itself reports a problem), "timed out" or "died".
        seconds: the stage's duration.
        figures: by name.
        bars: each `{"figure", "value", "at_least"}`.
        problems: failed checks.
        skipped: parts that could not run, each with the reason.
        reason: the reason if the status is not "ok".
    """

    stage: str
    status: str = "died"
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def went_well(self) -> bool:
        """Whether the stage has no problem, as far as it ran."""
        return self.status in ("ok", "skipped")

    def take(self, line: str) -> None:
        """Add a line that a stage has written; a truncated or unknown line is a problem."""
        try:
            [(kind, value)] = json.loads(line).items()
            if kind == "figures":
                self.figures.update(value)
            elif kind in ("bar", "problem", "skipped"):
                lists: dict[str, list[Any]] = {"bar": self.bars, "problem": self.problems, "skipped": self.skipped}
                lists[kind].append(value)
            elif kind == "end":
                self.status, self.reason = str(value["status"]), str(value["reason"])
            else:
                raise ValueError(kind)
        except (ValueError, TypeError, KeyError, AttributeError):
            self.problems.append(f"wrote what is no result: {line[:200]!r}")


def run_stage(name: str, command: Sequence[str], seconds: float) -> Result:
    """Run a command with the file for its results as an added last argument; never raises because of the command."""
    with tempfile.TemporaryDirectory(prefix="prelude-gpu-") as folder:
        written, log = Path(folder) / "results", Path(folder) / "log"
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(written)],
                cwd=ROOT,
                env=os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                in_time = _ended_within(process.pid, seconds)
            finally:
                _end_session(process)
        result = Result(name, seconds=round(time.monotonic() - began, 1))
        lines = written.read_text(errors="replace").splitlines() if written.exists() else []
        for line in lines:
            result.take(line)
        _judge(result, process.returncode, None if in_time else seconds, _last_lines(log))
    return result


def _judge(result: Result, code: int, limit: float | None, output: str) -> None:
    """Set the status and reason from how the process ended, if the stage has not set them."""
    ended = result.reason or result.status != "died"
    if limit is not None:
        result.status = "timed out"
        result.reason = f"no end within {limit:g} s; the last lines:\n{output}"
    elif not ended:
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        result.reason = f"ended with {end} and without a result; the last lines:\n{output}"
    elif result.status == "ok" and result.problems:
        result.status, result.reason = "failed", "; ".join(result.problems)


def _ended_within(pid: int, seconds: float) -> bool:
    """Whether a child ends in time; it is not reaped here, so that its pid stays valid until `wait`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, so that none uses the device when the next stage begins."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(log: Path) -> str:
    text = log.read_bytes()[-20_000:].decode(errors="replace").replace("\r", "\n")
    return "\n".join([line[:300] for line in text.splitlines() if line.strip()][-LAST_LINES:])


def child_command(stage: Stage, *, rehearse: bool) -> list[str]:
    """The command that starts a stage; see stage.py."""
    return [sys.executable, "-m", "benchmarks.gpu.stage", stage.name, *(["--rehearse"] if rehearse else [])]


def run_all(
    stages: Sequence[Stage],
    results: Path,
    seconds: float,
    *,
    rehearse: bool,
    command: Callable[[Stage], list[str]] | None = None,
) -> Iterator[Result]:
    """Run stages one after the other as results are consumed; appends and prints a line for each.

    Args:
        stages: the stages, in order.
        results: the file of result lines; an existing file is appended to.
        seconds: time limit of all stages together; the last of `STAGES` gets the remaining time.
        rehearse: tiny sizes, and a limit of `REHEARSAL_SECONDS` for each stage.
        command: returns the command for a stage.
    """
    end = time.monotonic() + (REHEARSAL_SECONDS * len(stages) if rehearse else seconds)
    for stage in stages:
        left = end - time.monotonic()
        limit = min(left, REHEARSAL_SECONDS if rehearse else left if stage is STAGES[-1] else stage.seconds)
        if left < LEAST_SECONDS:
            result = Result(stage.name, "skipped", reason=f"{max(0.0, left):.0f} s are left")
        else:
            started = command(stage) if command is not None else child_command(stage, rehearse=rehearse)
            result = run_stage(stage.name, started, limit)
        line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S"), "rehearsal": rehearse} | asdict(result))
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)
        yield result
