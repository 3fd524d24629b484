"""Measures the start time and memory of a server with ten thousand tasks.

Creates a store in a local folder, and opens the registry on it in a new process, without an engine:

    start       seconds to read all events and to determine what can be served
    idle        resident memory once the registry is open, before any request
    full        resident memory after every task was requested once, so that the host budget is used up

    python benchmarks/many_tasks.py                 # 10,000 tasks, and ten to compare with
    python benchmarks/many_tasks.py --tasks 1000

The store is written as a publish writes it, but without fsync, because only reading is measured. Prints a table and,
last, one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from task_store import NUM_VIRTUAL_TOKENS, SPEC, make_store
from tqdm import tqdm

from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.store import Store

FEW = 10
MB = 1e6


def resident() -> float:
    """Resident memory of this process."""
    gc.collect()
    memory: int = psutil.Process().memory_info().rss
    return memory / MB


def measure(folder: Path, host_memory: int) -> dict[str, float]:
    """Open the registry and request every task once, in a new process."""
    before, began = resident(), time.perf_counter()
    registry = Registry(Store(LocalObjects(folder)), SPEC, 512, host_memory)
    seconds = time.perf_counter() - began
    idle, began = resident(), time.perf_counter()
    tasks = registry.tasks()
    assert registry.errors == {}
    for task in tqdm(tasks, "asking", unit="task", leave=False):
        registry.fetch(registry.resolve(task.name)).result()
    return {
        "tasks": len(tasks),
        "start_s": seconds,
        "before_mb": before,
        "idle_mb": idle,
        "full_mb": resident(),
        "asking_s": time.perf_counter() - began,
        "kept_mb": registry.host.num_bytes / MB,
        "kept": len(registry.host),
    }


def in_fresh_process(folder: Path, host_memory: int) -> dict[str, float]:
    """Run `measure` in a new process."""
    command = [sys.executable, __file__, "--measure", str(folder), "--host-memory", str(host_memory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both stores, one after the other."""
    rows = []
    for tasks in (FEW, options.tasks):
        with tempfile.TemporaryDirectory(prefix="prelude-tasks-", dir=options.folder) as folder:
            with mock.patch("os.fsync"):
                make_store(Path(folder), tasks)
            rows.append(in_fresh_process(Path(folder), options.host_memory))
    few, many = rows
    return {
        "machine": f"{os.cpu_count()} cores {platform.machine()}",
        "host_memory": options.host_memory,
        "few": few,
        "many": many,
        "more_start_s": many["start_s"] - few["start_s"],
        "more_idle_mb": many["idle_mb"] - few["idle_mb"],
        "more_full_mb": many["full_mb"] - few["full_mb"],
    }


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--host-memory", type=int, default=100_000_000, help="bytes, as PRELUDE_HOST_MEMORY")
    parser.add_argument("--folder", help="where the store is made, and removed again; else where temporary files go")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.host_memory)))
        return
    result = run(options)
    budget = f"budget for the host {result['host_memory'] / MB:.0f} MB"
    print(f"\n{result['machine']}, {NUM_VIRTUAL_TOKENS} virtual tokens x {SPEC.hidden_size}, {budget}")
    print(f"{'tasks':>8}{'start':>10}{'idle':>10}{'full':>10}{'kept':>10}")
    for row in (result["few"], result["many"]):
        print(
            f"{row['tasks']:>8,}{row['start_s']:>8.2f} s{row['idle_mb']:>7.0f} MB{row['full_mb']:>7.0f} MB"
            f"{row['kept_mb']:>7.0f} MB"
        )
    more = (result["more_start_s"], result["more_idle_mb"], result["more_full_mb"])
    print(f"{'more':>8}{more[0]:>8.2f} s{more[1]:>7.0f} MB{more[2]:>7.0f} MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
