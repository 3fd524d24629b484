"""The frozen model that soft prompts are checked against."""

from __future__ import annotations

import pytest
import torch

from server.contracts import ModelSpec
from tests.support import tiny_model


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return tiny_model("llama", dtype=torch.float32).spec
