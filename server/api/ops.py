"""For operators: is it alive, is it ready, what is it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server import __version__
from server.api.auth import ERRORS as AUTH_ERRORS
from server.api.auth import Reads, may_see
from server.api.deps import RegistryDep, SettingsDep, WorkerDep
from server.api.schemas import ErrorBody, Health, Info, PrefixInfo
from server.errors import PreludeError, ServerDraining

NOT_READY: dict[int | str, dict[str, Any]] = {
    500: {"model": ErrorBody, "description": "The engine does not run."},
    503: {"model": ErrorBody, "description": "The server is shutting down."},
}

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/ready", responses=NOT_READY)
async def ready(worker: WorkerDep) -> Health:
    """The model is loaded, the engine steps, and new requests are taken."""
    if worker.draining:
        raise ServerDraining("The server is shutting down.")
    if not worker.responsive:
        raise PreludeError("The engine does not step.", remedy="Restart the server; its log says why.")
    return Health(status="ready")


@router.get("/info", responses=AUTH_ERRORS, dependencies=[Reads])
async def info(request: Request, worker: WorkerDep, registry: RegistryDep, settings: SettingsDep) -> Info:
    """The frozen model and the server's limits; tasks are counted that the key is for."""
    model, prefixes = worker.model, worker.prefixes
    return Info(
        model=model.name,
        fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        max_virtual_tokens=settings.max_virtual_tokens,
        dtype=model.dtype,
        device=model.device,
        version=__version__,
        tasks=sum(may_see(request, task.name) for task in registry.tasks()),
        in_flight=worker.num_in_flight,
        prefixes=PrefixInfo(hits=prefixes.hits, misses=prefixes.misses, budget_bytes=prefixes.budget_bytes),
    )
