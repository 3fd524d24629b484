"""The frozen model that soft prompts are checked against, and an S3 service on loopback."""

from __future__ import annotations

import pytest
import torch

from server.contracts import ModelSpec
from tests.registry.s3 import s3, s3_store_url
from tests.support import tiny_model

__all__ = ["s3", "s3_store_url"]


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return tiny_model("llama", dtype=torch.float32).spec
