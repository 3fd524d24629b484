"""The device that stages run on, and how they wait for it and time it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.gpu.stage import Run, Skipped
from server.engine.model.devices import choose_device
from server.errors import ConfigurationError

MB, GB = 1e6, 1e9


def device_of(run: Run) -> torch.device:
    """The first CUDA device, or in a rehearsal the CPU.

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
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The least time that a piece of work takes until the device has done it; once before, untimed."""
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
    """Bytes that the device reads and writes per second while it copies."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, 10)


def memory(device: torch.device) -> dict[str, float]:
    """GB that are allocated, reserved by torch's allocator, and at most were allocated; zeros on a CPU."""
    if device.type != "cuda":
        return {"allocated_gb": 0.0, "reserved_gb": 0.0, "peak_gb": 0.0}
    return {
        "allocated_gb": torch.cuda.memory_allocated(device) / GB,
        "reserved_gb": torch.cuda.memory_reserved(device) / GB,
        "peak_gb": torch.cuda.max_memory_allocated(device) / GB,
    }
