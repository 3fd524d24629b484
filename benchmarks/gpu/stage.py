"""The process of a stage: writes its figures to a file at once, and always reports how it ended.

    python -m benchmarks.gpu.stage NAME [--rehearse] RESULTS

The driver starts this module. Started by hand to investigate a stage, its output goes to the terminal.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.openmp import bound_primitives, expand_segments, share_cores

OURS = ("benchmarks", "server", "tests")
TRACEBACK_LINES = 8


class Skipped(Exception):
    """The stage cannot run on this machine; the message gives the reason."""


class Run:
    """Records the results of a stage.

    Attributes:
        rehearse: use tiny sizes on a CPU, only to check that every line runs.
    """

    def __init__(self, results: Path, *, rehearse: bool) -> None:
        """Append results to a file."""
        self.rehearse = rehearse
        self._results = results

    def note(self, **figures: Any) -> None:
        """Record figures by name."""
        self._write({"figures": {name: rounded(value) for name, value in figures.items()}})

    def bar(self, figure: str, value: float, at_least: float) -> None:
        """Record a figure with a target; missing the target is not a failure."""
        self.note(**{figure: value})
        self._write({"bar": {"figure": figure, "value": rounded(value), "at_least": at_least}})

    def check(self, holds: bool, problem: str) -> None:
        """Record a problem if a condition does not hold; the stage continues, but has failed."""
        if not holds:
            self._write({"problem": problem})

    def skip(self, part: str, why: str = "needs CUDA") -> None:
        """Record that a part cannot run on this machine."""
        self._write({"skipped": f"{part}: {why}"})

    def needs(self, *modules: str) -> None:
        """Raise `Skipped` if modules are not installed, with all their names."""
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            raise Skipped(f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed")

    def end(self, status: str, reason: str = "") -> None:
        """Write the last line."""
        self._write({"end": {"status": status, "reason": reason}})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with self._results.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def rounded(value: Any) -> Any:
    """Round all floats to four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def execute(measure: Callable[[Run], None], run: Run) -> None:
    """Run a stage; an exception becomes the reason in the last line."""
    try:
        measure(run)
    except Skipped as exc:
        run.end("skipped", str(exc))
    except ModuleNotFoundError as exc:
        traceback.print_exc()
        package = (exc.name or "").split(".")[0]
        if package in OURS or not package:
            run.end("failed", _last_lines(exc))
        else:
            run.end("skipped", f"needs {package}, which is not installed")
    except Exception as exc:  # noqa: BLE001 - any failure of a stage becomes a line
        traceback.print_exc()
        run.end("failed", _last_lines(exc))
    else:
        run.end("ok")


def _last_lines(exc: BaseException) -> str:
    lines = "".join(traceback.format_exception(exc)).splitlines()
    return "\n".join(line[:300] for line in lines[-TRACEBACK_LINES:])


def main() -> None:
    """Run a stage as a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("results", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    sys.path.insert(1, str(Path(__file__).parents[1]))  # for imports of the other benchmarks
    for prepare in (share_cores, bound_primitives, expand_segments):  # as a server does, before torch is imported
        prepare()
    logging.basicConfig(level=logging.INFO)  # for example, the reason for a missing fast path
    run = Run(options.results, rehearse=options.rehearse)

    def measure(run: Run) -> None:
        importlib.import_module(f"benchmarks.gpu.stages.{options.name}").measure(run)

    execute(measure, run)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips the interpreter's shutdown, which may fail on a lost device


if __name__ == "__main__":
    main()
