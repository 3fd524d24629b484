"""What is downloaded is what lay on the device."""

from __future__ import annotations

import torch

from server.engine.to_device import Download


def test_tensors_of_all_kinds_come_back_exactly_by_one_copy() -> None:
    tensors = [
        torch.tensor([float("nan"), -0.0, 1e-40], dtype=torch.float32),
        torch.tensor([[2**62, -1], [3, 4]]),
        torch.empty(0),
        torch.tensor([[0.1]], dtype=torch.float64),
    ]
    download = Download()
    numbers = [download.add(tensor) for tensor in tensors]
    for number, tensor in zip(numbers, tensors, strict=True):
        array = torch.from_numpy(download.array(number))
        assert array.dtype == tensor.dtype
        assert torch.equal(array.nan_to_num(nan=7.0), tensor.nan_to_num(nan=7.0))
        assert array.shape == tensor.shape
