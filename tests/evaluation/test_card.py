"""The card: says what was measured, and takes nothing away that people wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.engine.model.frozen import FrozenModel
from server.errors import ConfigurationError
from server.evaluation.card import BEGIN, END, render_card, write_card, write_metrics
from server.evaluation.report import Report
from server.evaluation.standalone import run
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.evaluation.support import data_of, prepared, soft_prompt_of
from tests.train.rows import MOODS

ABOUT: dict[str, Any] = {
    "description": "Moods.",
    "licence": "CC0",
    "training": {"steps": 5, "seed": 0},
    "labels": ["no", "yes"],
}


@pytest.fixture(scope="module")
def measured(tiny32: FrozenModel) -> tuple[Report, SoftPrompt]:
    soft_prompt = soft_prompt_of(tiny32, **ABOUT, metrics={"validation_loss": 0.5, "test_old": 1})
    engine, evaluation = prepared(tiny32, data_of(MOODS), soft_prompt, "zero-shot")
    return run(engine, evaluation), soft_prompt


def test_a_card_says_what_was_measured_and_how(measured: tuple[Report, SoftPrompt]) -> None:
    card = render_card(*measured, "prelude eval mood --data rows.jsonl")
    wanted = ["# mood", "Moods.", "5 virtual tokens (prompt tuning) for tiny-llama", "4 rows of `rows.jsonl`", "95 %"]
    wanted += [
        "| **mood** |",
        "| zero-shot |",
        "| `no` |",
        "    PRELUDE_DTYPE=float32 prelude eval mood --data rows.jsonl",
        "| steps | 5 |",
    ]
    wanted += ["## Licence\n\nCC0", "without the virtual tokens", "in float32"]
    assert [text for text in wanted if text not in card] == []


@pytest.mark.parametrize(("part", "how"), [("data", "learned from"), ("validation", "was chosen by")])
def test_figures_on_rows_that_made_the_soft_prompt_say_so(tiny32: FrozenModel, part: str, how: str) -> None:
    data = data_of(MOODS)
    soft_prompt = soft_prompt_of(tiny32, **ABOUT | {"training": {f"{part}_sha256": ["0", data.sha256]}})
    engine, evaluation = prepared(tiny32, data, soft_prompt)
    report = run(engine, evaluation)
    assert f"These are the rows that mood {how}" in render_card(report, soft_prompt, "prelude eval mood")
    assert report.as_dict()["known_from"] == ("training" if part == "data" else part)


def test_a_card_written_again_keeps_what_stands_around_it(tmp_path: Path) -> None:
    path = write_card(tmp_path, "one\n")
    assert path.read_text() == f"{BEGIN}\none\n{END}\n"
    path.write_text(f"# Mine\n\n{path.read_text()}\nAnd more.\n")
    write_card(tmp_path, "two\n")
    assert path.read_text() == f"# Mine\n\n{BEGIN}\ntwo\n{END}\n\nAnd more.\n"
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("text", ["# Mine\n", BEGIN, f"{END} {BEGIN}"])
def test_a_readme_by_hand_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ConfigurationError, match="was not written by `prelude eval`"):
        write_card(tmp_path, "one\n")
    assert (tmp_path / "README.md").read_text() == text


def test_figures_join_the_metrics_of_the_manifest_and_change_no_answer(
    tmp_path: Path, tiny32: FrozenModel, measured: tuple[Report, SoftPrompt]
) -> None:
    report, soft_prompt = measured
    save_soft_prompt(tmp_path, soft_prompt, tiny32.spec)
    before = soft_prompt.manifest.answers_identity()
    write_metrics(tmp_path, report)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    metrics = manifest["metrics"]
    assert metrics["validation_loss"] == 0.5
    assert "test_old" not in metrics, "figures of another test file are not these"
    assert (metrics["test_rows"], metrics["test_sha256"]) == (4, "0")
    assert metrics["test_accuracy_choices"] == round(report.scores["mood"].figures[report.main].value, 4)
    assert len(metrics["test_accuracy_choices_interval"]) == 2
    assert type(soft_prompt.manifest).model_validate(manifest).answers_identity() == before
