"""The frozen model that soft prompts are checked against, and an S3 service on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.contracts import ModelSpec
from server.registry.objects import LocalObjects, Objects, open_objects
from tests.registry.inbox import Home
from tests.registry.s3 import s3, s3_store_url
from tests.registry.shelf import Shelf
from tests.registry.stored import Open
from tests.support import tiny_model

__all__ = ["s3", "s3_store_url"]


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return tiny_model("llama", dtype=torch.float32).spec


@pytest.fixture
def home(tmp_path: Path, spec: ModelSpec) -> Home:
    (tmp_path / "prompts").mkdir()
    return Home(tmp_path / "prompts", spec)


@pytest.fixture
def local(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path)


@pytest.fixture(params=["file", "s3"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same, at first empty, place at every call."""
    url = f"file:{tmp_path}" if request.param == "file" else request.getfixturevalue("s3_store_url")
    return lambda: open_objects(url)


@pytest.fixture
def objects(open_again: Open) -> Objects:
    return open_again()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()
