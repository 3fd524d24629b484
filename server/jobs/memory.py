"""Whether a second copy of the frozen model fits beside the server.

On a CPU the weights are a file that is mapped: whoever else maps it shares the pages. On CUDA each process has a copy
of its own, and a device that is full would fail the server's next step as well as the job.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig

from server.engine.checkpoint import resolve_checkpoint
from server.engine.devices import choose_device, choose_dtype
from server.engine.preflight import free_memory, made
from server.errors import InsufficientMemory
from server.settings import Settings

ROOM = 1.3
"""Times the weights: they, and activations of a batch with their gradients, which `recompute` keeps small."""
MiB = 2**20


def check_fits(settings: Settings) -> None:
    """Refuse to load a second copy onto a device that has no room for it; on a CPU there is nothing to check.

    Raises:
        InsufficientMemory: says what is free and what would be needed.
    """
    device = choose_device(settings.device)
    if device.type != "cpu":
        need = int(ROOM * weight_bytes(settings, device))
        check_room(need, free_memory(device), str(device))


def check_room(need: int, free: int, device: str) -> None:
    """Refuse what does not fit.

    Raises:
        InsufficientMemory: it does not.
    """
    if need > free:
        raise InsufficientMemory(
            f"Training needs a second copy of the frozen model on {device}, {need / MiB:,.0f} MiB with room to work, "
            f"and {free / MiB:,.0f} MiB are free.",
            remedy="Lower PRELUDE_KV_MEMORY and restart the server, or train on another machine with `prelude train`.",
        )


def weight_bytes(settings: Settings, device: torch.device) -> int:
    """What the weights take in the dtype that they are served in, from the model's config alone."""
    checkpoint = resolve_checkpoint(settings.model, settings.model_name, settings.cache_dir)
    dtype = choose_dtype(settings.dtype, device)
    weights = made(AutoConfig.from_pretrained(checkpoint.location))
    return sum(stored.numbers for stored in weights.values()) * dtype.itemsize
