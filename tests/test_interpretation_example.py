"""The example of docs/interpretation.md tells what the page says, on the soft prompts that ship."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from server.engine.model.frozen import FrozenModel
from server.interpret.null_cache import NullCache
from server.interpret.static import Interpreter
from server.settings import Settings

SCRIPT = Path(__file__).parents[1] / "examples/interpretation.py"


def test_neighbours_are_those_of_the_start_and_the_lens_finds_the_labels(
    smollm2: FrozenModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(SCRIPT))
    interpreter = Interpreter(smollm2, NullCache(Settings.load().cache_dir / "interpretation"))
    both = {task: one for task, one in example["included"](interpreter).items() if task in ("emotion", "sms_spam")}
    found = example["tell"](interpreter, both, tmp_path)["emotion"]
    shown = capsys.readouterr().out
    assert "20 of 20 virtual tokens are nearest to the token they started from" in shown
    [spam] = [line for line in shown.splitlines() if line.strip().startswith("sms_spam ")]
    assert "raises 'ham'" in spam
    drawn = {path.stem.removeprefix("interpretation_") for path in tmp_path.iterdir()}
    assert drawn == {"emotion_tokens", "emotion_map", "emotion_lens", "sms_spam_lens", "sms_spam_change", "similarity"}
    assert found.verdict.startswith("All 20 virtual tokens are still nearest to the tokens they started from")
    assert "is near no word" in found.verdict
    assert found.lens is not None
    assert found.lens.labels is not None
    assert found.lens.labels.p <= 0.01
