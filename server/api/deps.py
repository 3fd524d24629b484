"""What endpoints ask for, as `Annotated` aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.engine.worker import EngineWorker
from server.registry.registry import Registry
from server.settings import Settings


def _worker(request: Request) -> EngineWorker:
    worker: EngineWorker = request.app.state.worker
    return worker


def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


WorkerDep = Annotated[EngineWorker, Depends(_worker)]
RegistryDep = Annotated[Registry, Depends(_registry)]
SettingsDep = Annotated[Settings, Depends(_settings)]
