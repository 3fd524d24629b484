"""Measures and checks everything that needs a GPU, in nine minutes, even if stages fail.

Each stage is a separate process with a time limit. Its result is one line of JSON, which is printed at once and
appended to a file. If a stage fails, hangs or dies, its line has the reason, and the next stage runs. Nothing is
downloaded and no model is needed: weights are random, and the tokenizer has a token for each byte.

    python -m benchmarks.gpu                           # nine minutes
    python -m benchmarks.gpu --stages graphs decode    # these only
    python -m benchmarks.gpu --minutes 4               # as many as fit, by importance
    python -m benchmarks.gpu --rehearse                # tiny sizes on a CPU: does every line run?

At the end it prints a summary and a table for RESULTS.md. Exits with 0 if all stages succeeded, else with 1; missed
bars are reported but are not failures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.gpu.driver import MINUTES, STAGES, Result, run_all
from benchmarks.gpu.summary import as_table, in_words


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, run the stages, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together; default %(default)g")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU; figures mean nothing")
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"), help="default %(default)s")
    options = parser.parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)  # the stage's processes must not survive
    asked = [stage for stage in STAGES if stage.name in options.stages]
    results: list[Result] = []
    try:
        for result in run_all(asked, options.results, 60 * options.minutes, rehearse=options.rehearse):
            results.append(result)  # noqa: PERF402 - after an interruption, the results so far count
    except KeyboardInterrupt:
        print("broken off", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{in_words(results)}\n")
    if options.rehearse:
        print("A rehearsal: its figures mean nothing.\n")
    print(as_table(results, f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip()))
    is_complete = len(results) == len(asked)
    return 0 if is_complete and all(r.went_well if options.rehearse else r.status == "ok" for r in results) else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
