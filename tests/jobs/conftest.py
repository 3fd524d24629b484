from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.model.frozen import FrozenModel
from server.settings import Settings
from tests.jobs.support import Yard, make_yard, save_tiny_model


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a child loads it."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def settings(model_directory: Path, tmp_path: Path) -> Settings:
    return Settings.load(
        model=str(model_directory), dtype="float32", device="cpu", max_model_len=128, prompts_dir=tmp_path / "prompts"
    )


@pytest.fixture
def yard(settings: Settings, tiny32: FrozenModel) -> Yard:
    return make_yard(settings, tiny32)
