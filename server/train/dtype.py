"""The dtype of training where none is set: the one that this machine multiplies fastest.

Serving reads every weight once per generated token, so bfloat16, which halves the bytes to read, pays off wherever the
CPU supports it. Training multiplies whole batches, and some CPUs that know bfloat16 do that more slowly than in
float32: an Intel Xeon without AMX at 0.54 of the speed (benchmarks/RESULTS.md).
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from server.engine.model.devices import choose_device, choose_dtype
from server.settings import Settings

ROWS, FED, MADE = 512, 512, 1024
"""Dimensions of the matrix product that is timed (a few hundred microseconds)."""
ROUNDS = 9
CLEARLY = 1.25
"""float32 is chosen only if it is faster by this factor; with a factor near 1, two runs of the same command could
choose differently."""


def training_settings(settings: Settings, seconds: Callable[[torch.dtype], float] | None = None) -> Settings:
    """The same, with the dtype that training takes; one that is not `auto` stays.

    `seconds` says how long a product takes in a dtype; by default one is timed.
    """
    seconds = seconds or _seconds
    device = choose_device(settings.device)
    if settings.dtype != "auto" or device.type != "cpu" or choose_dtype("auto", device) == torch.float32:
        return settings
    times = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(ROUNDS):  # alternately, and the best of each: other programs then disturb both alike
        for dtype in times:
            times[dtype] = min(times[dtype], seconds(dtype))
    faster = times[torch.bfloat16] > CLEARLY * times[torch.float32]
    return settings.model_copy(update={"dtype": "float32" if faster else "bfloat16"})


def _seconds(dtype: torch.dtype) -> float:
    states, weight = torch.ones(ROWS, FED, dtype=dtype), torch.ones(MADE, FED, dtype=dtype)
    started = time.perf_counter()
    F.linear(states, weight)
    return time.perf_counter() - started
