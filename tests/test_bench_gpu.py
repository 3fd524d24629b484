"""The run on a borrowed GPU loses nothing: whatever a stage does, it becomes one line, and the next stage runs."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.driver import MINUTES, STAGES, Result, Stage, run_all, run_stage
from benchmarks.gpu.stage import Run, Skipped, execute
from benchmarks.gpu.summary import as_table, in_words
from tests.soak import Soak


def python(code: str) -> list[str]:
    """A command that runs code in an interpreter that imports nothing else; `results` is the file to write to."""
    begin = "import os, signal, subprocess, sys, time; results = open(sys.argv[1], 'a', buffering=1);"
    return [sys.executable, "-I", "-S", "-c", f"{begin}\n{code}"]


NOTES = """results.write('{"figures": {"speed": 3.5}}\\n')\n"""
ENDS = """results.write('{"end": {"status": "ok", "reason": ""}}\\n')\n"""


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (NOTES + ENDS, "ok", ""),
        (NOTES + "print('where it hangs', flush=True)\ntime.sleep(60)", "timed out", "where it hangs"),
        (NOTES + "os._exit(3)", "died", "status 3"),
        (NOTES + "os._exit(0)", "died", "status 0"),
        (NOTES + "os.kill(os.getpid(), signal.SIGKILL)", "died", "SIGKILL"),
        (NOTES + "os.kill(os.getpid(), signal.SIGSEGV)", "died", "SIGSEGV"),
        (NOTES + "raise RuntimeError('no kernel image')", "died", "RuntimeError: no kernel image"),
        (NOTES + "print('junk ' * 99)\nsys.stdout.buffer.write(bytes(range(256)))\n" + ENDS, "ok", ""),
        (NOTES + "results.write('junk\\n[1]\\n{\"end\": 7}\\n')\n" + ENDS, "failed", "wrote what is no result: 'junk'"),
        (NOTES + 'results.write(\'{"figures": {"to\')', "died", "status 0"),
        (NOTES + 'results.write(\'{"problem": "40 differ"}\\n\')\n' + ENDS, "failed", "40 differ"),
        (NOTES + 'results.write(\'{"end": {"status": "skipped", "reason": "needs CUDA"}}\')', "skipped", "needs CUDA"),
    ],
)
def test_whatever_a_stage_does_it_becomes_a_line_with_what_it_had_found(code: str, status: str, reason: str) -> None:
    result = run_stage("stage", python(code), 0.5 if status == "timed out" else 30)
    assert (result.status, result.figures) == (status, {"speed": 3.5})
    assert reason in result.reason
    assert bool(result.reason) == (status != "ok")
    assert result.went_well == (status in ("ok", "skipped"))


@pytest.mark.parametrize("then", ["time.sleep(60)", ENDS, "os._exit(1)"])
def test_what_a_stage_has_started_ends_with_it(then: str, tmp_path: Path) -> None:
    """A server that stays behind would hold the device's memory."""
    pid = tmp_path / "pid"
    start = "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)'])\n"
    run_stage("stage", python(f"{start}open({str(pid)!r}, 'w').write(str(child.pid))\n{then}"), 1)
    child = int(pid.read_text())
    end = time.monotonic() + 5
    while _runs(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_stage_is_a_line_in_the_file_and_on_the_screen_whatever_came_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages = [Stage("one", 30, ""), Stage("two", 0.3, ""), Stage("three", 30, ""), Stage("four", 30, "")]
    codes = {"one": "os._exit(1)", "two": "time.sleep(60)", "three": NOTES + ENDS, "four": "1 / 0"}
    path = tmp_path / "results.jsonl"
    path.write_text('{"of": "an earlier run"}\n')
    results = list(run_all(stages, path, 600, rehearse=False, command=lambda stage: python(codes[stage.name])))
    lines = path.read_text().splitlines()
    assert lines[1:] == [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["stage"] for line in lines[1:]] == ["one", "two", "three", "four"]
    assert [result.status for result in results] == ["died", "timed out", "ok", "died"]
    words = in_words(results)
    assert "1 of 4 stages went well" in words
    assert "ZeroDivisionError" in words


def test_no_stage_starts_when_the_time_is_up(tmp_path: Path) -> None:
    stages = [Stage("long", 30, ""), Stage("next", 30, "")]
    began = time.monotonic()
    results = list(
        run_all(stages, tmp_path / "r", 5.3, rehearse=False, command=lambda stage: python("time.sleep(0.4)\n" + ENDS))
    )
    assert [result.status for result in results] == ["ok", "skipped"]
    assert time.monotonic() - began < 5


def test_all_stages_together_take_nine_minutes_and_have_a_module_each() -> None:
    assert MINUTES <= 9
    folder = Path(__file__).parents[1] / "benchmarks" / "gpu" / "stages"
    assert {stage.name for stage in STAGES} == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    rows = (folder.parent / "README.md").read_text(encoding="utf-8").splitlines()
    documented = [row.split("|")[1].strip(" `") for row in rows if row.startswith("| `")]
    assert documented == [stage.name for stage in STAGES]


def lacks(name: str) -> Callable[[Run], None]:
    def measure(run: Run) -> None:
        importlib.import_module(name)

    return measure


def fails(run: Run) -> None:
    run.note(before=1.0)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def skips(run: Run) -> None:
    raise Skipped("needs CUDA")


def checks(run: Run) -> None:
    run.check(True, "never told")
    run.check(False, "9 rows differ")
    run.bar("share", 0.4123456, 0.6)
    run.skip("graphs")


def needs(run: Run) -> None:
    run.needs("json", "no_such_package", "nor_this")


@pytest.mark.parametrize(
    ("measure", "status", "reason"),
    [
        (fails, "failed", "illegal memory access"),
        (skips, "skipped", "needs CUDA"),
        (checks, "failed", "9 rows differ"),
        (needs, "skipped", "needs no_such_package, nor_this, which are not installed"),
        (lacks("no_such_package.part"), "skipped", "needs no_such_package, which is not installed"),
        (lacks("server.no_such_module"), "failed", "server.no_such_module"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_stage_ends_by_saying_how(
    measure: Callable[[Run], None], status: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results"
    execute(measure, Run(path, rehearse=True))
    result = Result("stage")
    lines = path.read_text().splitlines()
    for line in lines:
        result.take(line)
    if result.status == "ok" and result.problems:  # as the driver judges
        result.status, result.reason = "failed", "; ".join(result.problems)
    assert result.status == status
    assert reason in result.reason
    if measure is checks:
        assert result.bars == [{"figure": "share", "value": 0.4123, "at_least": 0.6}]
        assert result.skipped == ["graphs: needs CUDA"]


def test_the_table_has_every_figure_and_the_words_every_bar_that_was_missed() -> None:
    machine = Result("machine", "ok", 8.1, {"device": "NVIDIA H200", "torch": "2.11.0", "driver": "580.65"})
    decode = Result("decode", "ok", 80.0, {"step_ms": {"1": 5.25, "256": 13.0}, "tokens_s": 19692.3, "graphs": True})
    decode.bars.append({"figure": "share 256", "value": 0.4, "at_least": 0.6})
    decode.figures["share 256"] = 0.4
    failed = Result("http", "timed out", 70.0, reason="no end within 70 s")
    table = as_table([machine, decode, failed], "python -m benchmarks.gpu")
    assert "NVIDIA H200" in table.splitlines()[0]
    for row in ("| | step ms 256 | 13 | |", "| | tokens s | 19,692 | |", "| | share 256 | 0.4 | ≥ 0.6 |"):
        assert row in table.splitlines()
    assert "| http | | **timed out**, 70 s | |" in table.splitlines()
    words = in_words([machine, decode, failed])
    assert "decode: share 256 is 0.4, the bar is 0.6" in words
    assert "http: timed out: no end within 70 s" in words


@pytest.mark.soak
def test_a_rehearsal_runs_every_stage_to_its_end(soak: Soak, tmp_path: Path) -> None:
    soak.only_in_full()
    path = tmp_path / "results.jsonl"
    assert main(["--rehearse", "--results", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in STAGES]
    for line in lines:
        assert line["status"] == "ok", line
        assert all("CUDA" in part for part in line["skipped"]), line


def test_a_rehearsed_stage_runs_to_its_end(tmp_path: Path) -> None:
    """The shortest of them; `make soak` and `make bench-gpu ARGS=--rehearse` run all, each in its process."""
    path = tmp_path / "results"
    run = Run(path, rehearse=True)
    execute(lambda run: importlib.import_module("benchmarks.gpu.stages.attention").measure(run), run)
    assert json.loads(path.read_text().splitlines()[-1]) == {"end": {"status": "ok", "reason": ""}}
