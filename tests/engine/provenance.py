"""Where tensors come from, followed on a CPU: a device's tensors must not meet those of the host by accident.

On CUDA such a meeting raises, or makes the host wait for a copy. On a CPU all is one memory, so nothing shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engine import runner
from server.engine import to_device as upload
from server.engine.attention import cached_rows as layout
from server.engine.attention import recurrent, varlen_rows
from server.engine.sampling import filters as distribution
from server.engine.sampling import logit_rows, sampler


class Meeting(AssertionError):
    """An operator takes tensors of the device and of the host."""


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where an operator mixes tensors of the device with those of the host that are no single numbers.

    A device's tensors are those it begins with, what is sent to it, and what operators make of them. What operators
    make of no tensor at all may be either. All others are the host's.
    """

    def __init__(self, on_device: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device: dict[int, torch.UntypedStorage] = {}  # which are held, so that no address comes back
        self._either: dict[int, torch.UntypedStorage] = {}
        for tensor in on_device:
            self.sent(tensor)
        self.sends = 0

    def sent(self, tensor: torch.Tensor) -> None:
        """A tensor has been sent to the device."""
        storage = tensor.untyped_storage()
        self._device[storage.data_ptr()] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = _tensors((args, kwargs))
        device = [tensor for tensor in taken if _address(tensor) in self._device]
        host = [tensor for tensor in taken if _address(tensor) not in self._device | self._either and tensor.numel()]
        if device and any(tensor.dim() for tensor in host):
            shapes = [tuple(tensor.shape) for tensor in host]
            raise Meeting(f"{func.name()} takes tensors of the host, {shapes}, beside those of the device")
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if device:
                self.sent(tensor)
            elif not host:
                self._either[_address(tensor)] = tensor.untyped_storage()
        return out

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the way of CUDA in `to_device.py`, with copies in the place of pinned memory, and note what is sent."""
        monkeypatch.setattr(upload, "is_host", lambda device: False)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        for module in (distribution, layout, logit_rows, recurrent, runner, sampler, varlen_rows):
            monkeypatch.setattr(module, "upload", self._noted(upload.upload))
        monkeypatch.setattr(runner, "send", self._noted(upload.send))

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            out = function(*args)
            self.sends += 1
            for tensor in _tensors(out):
                self.sent(tensor)
            return out

        return noted


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
