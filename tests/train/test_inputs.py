"""What is wrong with files and options is told before anything is loaded."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import InvalidTrainingData
from server.train.config import TrainingConfig
from server.train.inputs import TaskFiles, read_task
from tests.train.rows import MOODS, write_rows


def test_labels_to_begin_with_are_asked_for(tmp_path: Path) -> None:
    texts = [(text, f"{text}!") for text, _ in MOODS]
    files = TaskFiles("mood", write_rows(tmp_path / "rows.jsonl", texts), write_rows(tmp_path / "held.jsonl", MOODS))
    with pytest.raises(InvalidTrainingData, match=r"rows\.jsonl are no labels: .* Use init 'vocab' or 'text'\."):
        read_task(files, TrainingConfig(init="labels"))


def test_labels_are_found_and_rows_held_out(tmp_path: Path) -> None:
    rows = read_task(TaskFiles("mood", write_rows(tmp_path / "rows.jsonl", MOODS * 5)), TrainingConfig())
    assert rows.labels == (("no", "yes"),)
    assert len(rows.training[0].rows) + len(rows.validation[0].rows) == 5 * len(MOODS)


@pytest.mark.parametrize("template", ["{input}", "{system}{input}{system}"])
def test_a_template_for_system_messages_has_a_place_for_them(tmp_path: Path, template: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", MOODS * 5)
    files = TaskFiles("mood", rows, input_template=template, system_message="template")
    with pytest.raises(InvalidTrainingData, match=r"does not hold \{system\} exactly once"):
        read_task(files, TrainingConfig())
    assert read_task(replace(files, input_template="{system}|{input}"), TrainingConfig())
    assert read_task(replace(files, system_message="refuse"), TrainingConfig())


def test_reading_rows_needs_no_torch() -> None:
    code = "import sys, server.train.inputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
