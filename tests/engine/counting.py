"""What a device would have to do for a step, counted on a CPU: operators to launch, arrays to upload, waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engine.sampling import filters as distribution
from server.engine.sampling import logit_rows, sampler
from server.engine.to_device import upload

VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "expand",
    "lift_fresh",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "view_as",
}
"""Operators that launch nothing."""

READS = {"__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist"}
"""Methods of a tensor for which the host waits, if it lies on a device."""


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that a device would launch, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many numbers the largest tensor holds that an operator answers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        answers = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *answers])
        return out


class Reads(TorchFunctionMode):
    """Counts how often the host reads what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._read: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in READS and not any(args[0] is tensor for tensor in self._read):
            self.names.append(name)
            if name == "cpu":  # reading the copy needs no device
                self._read.append(out)
        return out


def count_uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the length of every upload for sampling and scoring from now on."""
    uploads: list[int] = []

    def counted(arrays: Any, device: torch.device) -> Any:
        uploads.append(sum(map(len, arrays)))
        return upload(arrays, device)

    for module in (distribution, logit_rows, sampler):
        monkeypatch.setattr(module, "upload", counted)
    return uploads
