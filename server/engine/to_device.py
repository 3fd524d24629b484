"""Copies small arrays to the model's device and back, while the host waits for the device as little as possible.

A plain `torch.tensor(…, device="cuda")` waits until everything queued before it has run. From pinned memory a copy is
queued like any other work; torch keeps that memory until the copy is done. On the way back the host has to wait, so all
that a step answers comes by one copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch


def is_host(device: torch.device) -> bool:
    """Whether what lies on a device need not be copied there; tests say no, to take the way of CUDA on a CPU."""
    return device.type == "cpu"


def on_host(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the host, pinned if it is to go to another device."""
    tensor = torch.from_numpy(array)
    return tensor if is_host(device) else tensor.pin_memory()


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arrays `[n]` of one dtype as tensors on a device, by one copy."""
    if is_host(device):
        return tuple(torch.from_numpy(array) for array in arrays)
    joined = on_host(np.concatenate(arrays), device).to(device, non_blocking=True)
    return torch.split(joined, [len(array) for array in arrays])


def send(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the host on a device, in a dtype; the host does not wait for the copy."""
    on_its_way = tensor.to(dtype)
    return on_its_way if is_host(device) else on_its_way.pin_memory().to(device, non_blocking=True)


NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}
"""What can be downloaded, and as what."""


class Download:
    """Small tensors on their way to the host, all by one copy."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[np.ndarray] | None = None

    def add(self, tensor: torch.Tensor) -> int:
        """Ask for a contiguous tensor of one of `NUMPY`; its number is what `array` takes."""
        assert self._arrays is None, "the copy has been made"
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def array(self, number: int) -> np.ndarray:
        """A tensor's numbers, in its shape; the first call waits for the device."""
        if self._arrays is None:
            self._arrays = _fetch(self._tensors)
        return self._arrays[number]


def _fetch(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    joined = np.from_dlpack(torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors]).cpu())
    ends = itertools.accumulate(tensor.nbytes for tensor in tensors)
    # A tensor's bytes may begin anywhere in those of all; copies are aligned.
    return [
        joined[end - tensor.nbytes : end].copy().view(NUMPY[tensor.dtype]).reshape(tensor.shape)
        for tensor, end in zip(tensors, ends, strict=True)
    ]
