"""Nulls on disk: each depends only on the frozen model and a few numbers, so it is computed once.

A file is complete or absent. The folder keeps the newest `MOST_FILES` files. A file that cannot be read counts as
absent, and a folder that cannot be written to only costs time.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from server.durable import replace_file

log = logging.getLogger(__name__)

FORMAT = "1"
"""Raised when a null is computed differently."""
MOST_FILES = 64


class NullCache:
    """Named nulls, each a few tensors, in a folder; without a folder, nothing is kept."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = None if directory is None else directory.expanduser()

    def get(self, name: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The null of this name, in float32 on the CPU; computed and kept if it is not there."""
        if self._directory is None:
            return compute()
        path = self._directory / f"{name}-{FORMAT}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(path)
        found = {key: value.detach().float().cpu().contiguous() for key, value in compute().items()}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_file(path, save(found))
            self._drop_oldest()
        except OSError as exc:
            log.info("a null cannot be kept in %s: %s", self._directory, exc.strerror or exc)
        return found

    def _drop_oldest(self) -> None:
        assert self._directory is not None, "it has just been written to"
        files = sorted(self._directory.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[MOST_FILES:]:
            file.unlink(missing_ok=True)
