"""Small arrays from the host to where the model is, without making the host wait for the device.

A plain `torch.tensor(…, device="cuda")` waits until everything queued before it has run. From pinned memory a copy is
queued like any other work; torch keeps that memory until the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def on_host(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the host, pinned if it is to go to another device."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arrays `[n]` of one dtype as tensors on a device, by one copy."""
    if device.type == "cpu":
        return tuple(torch.from_numpy(array) for array in arrays)
    joined = on_host(np.concatenate(arrays), device).to(device, non_blocking=True)
    return torch.split(joined, [len(array) for array in arrays])
