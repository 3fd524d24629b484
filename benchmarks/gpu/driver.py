"""Runs stages, each as a process of its own with a time limit, and makes one line of JSON of each, whatever happens.

Needs nothing but the standard library: it must survive what it measures. A stage writes what it finds to a file as it
goes, a line of JSON each, so a stage that hangs or dies leaves what it has found by then.
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
"""Lines of a stage's output that its reason may hold."""
LEAST_SECONDS = 5.0
"""No stage starts with less time left."""
POLL_SECONDS = 0.02
REHEARSAL_SECONDS = 600.0
"""What each stage may take in a rehearsal: a busy machine imports torch for minutes."""


@dataclass(frozen=True)
class Stage:
    """What may run, and for how long at most."""

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
"""In order of worth: whoever has less time has measured what matters."""

MINUTES = sum(stage.seconds for stage in STAGES) / 60


@dataclass
class Result:
    """What became of a stage.

    Attributes:
        status: "ok"; "skipped", with the reason; "failed": it says itself that something is wrong; "timed out"; "died".
        seconds: how long it took.
        figures: by name.
        bars: each `{"figure", "value", "at_least"}`.
        problems: checks that did not hold.
        skipped: parts that could not run, each with the reason.
        reason: why it is not ok.
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
        """Whether nothing is wrong as far as it ran."""
        return self.status in ("ok", "skipped")

    def take(self, line: str) -> None:
        """Add one line of what a stage has written; one that is torn, or no object of ours, is a problem."""
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
    """Run a command whose last argument, added here, is the file for its results; raises for nothing that it does."""
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
    """Set the status and the reason from how a process ended, if it has not said so itself."""
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
    """Whether a child ends in time; it is left for `wait`, so that its number stays taken."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started: nothing may hold the device when the next stage begins."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(log: Path) -> str:
    text = log.read_bytes()[-20_000:].decode(errors="replace").replace("\r", "\n")
    return "\n".join([line[:300] for line in text.splitlines() if line.strip()][-LAST_LINES:])


def child_command(stage: Stage, *, rehearse: bool) -> list[str]:
    """Starts a stage; see stage.py."""
    return [sys.executable, "-m", "benchmarks.gpu.stage", stage.name, *(["--rehearse"] if rehearse else [])]


def run_all(
    stages: Sequence[Stage],
    results: Path,
    seconds: float,
    *,
    rehearse: bool,
    command: Callable[[Stage], list[str]] | None = None,
) -> Iterator[Result]:
    """Run stages one after the other, each as soon as the one before is taken; appends and prints a line for each.

    Args:
        stages: in order.
        results: the file of lines; kept if it is there.
        seconds: for all together; the last of `STAGES` takes what the others have left.
        rehearse: tiny sizes, and no race: every stage may take `REHEARSAL_SECONDS`.
        command: what to start for a stage.
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
