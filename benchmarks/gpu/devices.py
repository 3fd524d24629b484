"""The device of the stages, and functions to wait for it and to time work on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.gpu.stage import Run, Skipped
from server.engine.model.devices import choose_device
from server.errors import ConfigurationError

MB, GB = 1e6, 1e9


def device_of(run: Run) -> torch.device:
    """The first CUDA device; in a rehearsal, the CPU.

    Raises:
        Skipped: there is no CUDA.
    """
    if run.rehearse:
        torch.set_num_threads(min(2, torch.get_num_threads()))
        return torch.device("cpu")
    try:
        return choose_device("cuda")
    except ConfigurationError as exc:
        raise Skipped(f"needs CUDA: {exc.message}") from exc


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The shortest time of several runs until the device has finished; the first run is not timed."""
    work()
    times = []
    for _ in range(rounds):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def copied_per_second(device: torch.device, num_bytes: int) -> float:
    """Bytes per second that the device reads and writes in a copy."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, 10)


def memory(device: torch.device) -> dict[str, float]:
    """GB allocated, GB reserved by torch's allocator, and the peak of allocated GB; zeros on a CPU."""
    if device.type != "cuda":
        return {"allocated_gb": 0.0, "reserved_gb": 0.0, "peak_gb": 0.0}
    return {
        "allocated_gb": torch.cuda.memory_allocated(device) / GB,
        "reserved_gb": torch.cuda.memory_reserved(device) / GB,
        "peak_gb": torch.cuda.max_memory_allocated(device) / GB,
    }
