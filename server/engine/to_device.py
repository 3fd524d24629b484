"""Copies small arrays to the model's device and back, with as little waiting on the host as possible.

A plain `torch.tensor(…, device="cuda")` waits until all work queued before it is done. A copy from pinned memory is
queued like other work; torch keeps that memory until the copy is done. On the way back the host has to wait, so one
copy returns all results of a step.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch


def is_host(device: torch.device) -> bool:
    """Whether a device uses host memory, so that nothing is copied. Tests replace it to use CUDA's path on a CPU."""
    return device.type == "cpu"


def on_host(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the host, pinned if it will be copied to another device."""
    tensor = torch.from_numpy(array)
    return tensor if is_host(device) else tensor.pin_memory()


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Copy arrays `[n]` of one dtype to a device as tensors, in one copy."""
    if is_host(device):
        return tuple(torch.from_numpy(array) for array in arrays)
    joined = on_host(np.concatenate(arrays), device).to(device, non_blocking=True)
    return torch.split(joined, [len(array) for array in arrays])


def send(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Copy a host tensor to a device in the given dtype; the host does not wait."""
    tensor = tensor.to(dtype)
    return tensor if is_host(device) else tensor.pin_memory().to(device, non_blocking=True)


NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}
"""The dtypes that can be downloaded, and their numpy types."""


class Download:
    """Copies several small tensors to the host in one copy."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[np.ndarray] | None = None

    def add(self, tensor: torch.Tensor) -> int:
        """Add a contiguous tensor with a dtype in `NUMPY`; returns its number for `array`."""
        assert self._arrays is None, "the copy has been made"
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def array(self, number: int) -> np.ndarray:
        """A tensor as a numpy array; the first call waits for the device."""
        if self._arrays is None:
            self._arrays = _fetch(self._tensors)
        return self._arrays[number]


def _fetch(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    joined = np.from_dlpack(torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors]).cpu())
    ends = itertools.accumulate(tensor.nbytes for tensor in tensors)
    # A tensor may begin at any byte of the joined copy; `copy` aligns it.
    return [
        joined[end - tensor.nbytes : end].copy().view(NUMPY[tensor.dtype]).reshape(tensor.shape)
        for tensor, end in zip(tensors, ends, strict=True)
    ]
