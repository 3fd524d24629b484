"""Measures tokens per second over HTTP with 64 and 256 streams, their processor time, and time to first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.gpu import clients, server
from benchmarks.gpu.devices import device_of
from benchmarks.gpu.stage import Run

PROCESSES = 8
"""Maximum number of client processes; each handles a few thousand events per second."""
OUTPUT_TOKENS = 64
START_SECONDS = 45.0


def measure(run: Run) -> None:
    """Measure one server under one load after the other."""
    run.needs(*server.NEEDED)
    device_of(run)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="prelude-gpu-") as name:
        start = 4 * START_SECONDS if run.rehearse else START_SECONDS
        with server.serving(Path(name), start, rehearse=run.rehearse, tiny=False) as live:
            run.note(start_s=time.perf_counter() - began)
            for streams in (4, 8) if run.rehearse else (64, 256):
                _load(run, live, streams)


def _load(run: Run, live: server.Server, streams: int) -> None:
    warm_up, seconds = (1.0, 2.0) if run.rehearse else (2.0, 7.0)
    processes = min(PROCESSES, streams // 4, max(1, (os.cpu_count() or 2) // 2))
    given = [live.port, streams // processes, warm_up, seconds, 8 if run.rehearse else OUTPUT_TOKENS]
    command = [sys.executable, clients.__file__, *map(str, given)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    time.sleep(warm_up)
    before, began = _cpu_seconds(live), time.perf_counter()
    time.sleep(seconds)
    cores = (_cpu_seconds(live) - before) / (time.perf_counter() - began)
    found = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    first = [one for part in found for one in part["first"]]
    run.note(
        **{
            f"streams_{streams}_tokens_s": sum(part["tokens"] for part in found) / seconds,
            f"streams_{streams}_cores": cores,
        }
    )
    if first:
        p50, p99 = (float(value) for value in 1000 * np.percentile(first, (50, 99)))
        run.note(**{f"streams_{streams}_first_token_p50_ms": p50, f"streams_{streams}_first_token_p99_ms": p99})
    refused = [reason for part in found for reason in part["refused"]]
    run.check(bool(first) and not refused, f"{streams} streams: {len(first)} began, {refused[:3]}")


def _cpu_seconds(live: server.Server) -> float:
    times = psutil.Process(live.process.pid).cpu_times()
    return float(times.user + times.system)
