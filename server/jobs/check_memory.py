"""Whether a second copy of the frozen model fits beside the server.

On a CPU the weights are a mapped file: all processes that map it share the pages. On CUDA each process has a copy of
its own. The server allocates all its memory at start (`build.take_all`), so a job may use all memory that is free when
the job starts.
"""

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from server.engine.model import preflight
from server.engine.model.devices import choose_device, choose_dtype
from server.engine.model.loading import CONFIG, check_files
from server.engine.model.preflight import Stored, free_memory, made, quantisation
from server.engine.model.weights import resolve_checkpoint
from server.errors import InsufficientMemory
from server.settings import Settings

ROOM = 1.3
"""Factor on the size of the weights: room for the weights themselves and for a batch's activations and gradients, which
`recompute` keeps small."""
MiB = 2**20


def check_fits(settings: Settings) -> None:
    """Refuse to load a second copy onto a device without room for it (InsufficientMemory); a CPU needs no room."""
    device = choose_device(settings.device)
    if device.type != "cpu":
        need = int(ROOM * weight_bytes(settings, device))
        check_room(need, free_memory(device), str(device))


def check_room(need: int, free: int, device: str) -> None:
    """Raise InsufficientMemory, with both sizes, if less is free than a job needs."""
    if need > free:
        raise InsufficientMemory(
            f"Training needs a second copy of the frozen model on {device}, {need / MiB:,.0f} MiB with room to work, "
            f"and {free / MiB:,.0f} MiB are free.",
            remedy="Lower PRELUDE_KV_MEMORY and restart the server, or train on another GPU or machine with `prelude "
            "train`.",
        )


def weight_bytes(settings: Settings, device: torch.device) -> int:
    """What the weights take in the dtype that they are served in; of a quantised checkpoint, as they are stored."""
    checkpoint = resolve_checkpoint(settings.model, settings.model_name, settings.cache_dir)
    config = AutoConfig.from_pretrained(checkpoint.location)
    method = quantisation(config)
    stored = made(config) if method is None else _stored(checkpoint.location) or made(config)
    return preflight.weight_bytes(stored.values(), method, device, choose_dtype(settings.dtype, device))


def _stored(location: str) -> dict[str, Stored]:
    """Weights of a directory, or of a hub's model that is on this machine, as the server has loaded it."""
    if not Path(location).is_dir():
        found = try_to_load_from_cache(location, CONFIG)
        if not isinstance(found, str):
            return {}
        location = str(Path(found).parent)
    return check_files(Path(location))
