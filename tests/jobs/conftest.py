from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.model.frozen import FrozenModel
from server.settings import Settings
from server.soft_prompts.formats import save_soft_prompt
from tests.jobs.support import Yard, make_yard
from tests.support import random_soft_prompt


@pytest.fixture
def settings(model_directory: Path, tmp_path: Path) -> Settings:
    return Settings.load(
        model=str(model_directory), dtype="float32", device="cpu", max_model_len=128, prompts_dir=tmp_path / "prompts"
    )


@pytest.fixture
def yard(settings: Settings, tiny32: FrozenModel) -> Yard:
    return make_yard(settings, tiny32)


@pytest.fixture
def result(tiny32: FrozenModel, tmp_path: Path) -> str:
    """Code that leaves a result at once."""
    saved = tmp_path / "saved"
    save_soft_prompt(saved, random_soft_prompt(tiny32.spec), tiny32.spec)
    return f"shutil.copytree({str(saved)!r}, folder / 'result')\n"
