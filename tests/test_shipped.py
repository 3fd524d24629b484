"""What ships loads, says how it was measured, and is told of in README and RESULTS.md with that very figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.evaluation.card import BEGIN, END
from server.evaluation.metrics import ACCURACY, BLEU, EXACT_MATCH, ROUGE_L
from server.soft_prompts.manifest import Manifest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path.parent for path in [*ROOT.glob("prompts/*/manifest.json"), ROOT / "examples/sentiment/manifest.json"]
)


HEADLINES = (ACCURACY, EXACT_MATCH, BLEU, ROUGE_L)
"""One of which the README tells of each task."""


def cell_of(card: str, row: str, column: str) -> str:
    """A figure of a card's first table."""
    table = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    [place] = [place for place, title in enumerate(table[0], 1) if title == column]
    [cells] = [cells for cells in table if cells[0] == row]
    return cells[place]


def rows_of(page: str, task: str) -> list[str]:
    """Table rows that begin with a task's name, linked or not."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^\| \[?`{task}`.*$", text, re.MULTILINE)


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_soft_prompt_has_the_figure_of_its_card_in_readme_and_results(directory: Path) -> None:
    [told] = rows_of("README.md", directory.name)
    [metric] = [metric for metric in HEADLINES if f"| {metric.title} |" in told]
    metrics = Manifest.parse((directory / "manifest.json").read_bytes()).metrics or {}
    value = metrics[f"test_{metric.key}"]
    figure = f"{100 * value:.1f} %" if metric.is_share else f"{value:.1f}"
    card = (directory / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    cell = cell_of(card, f"**{directory.name}**", metric.title)
    assert cell.startswith(f"{figure} (")
    assert f"| {figure} |" in told
    assert any(f"| {cell} |" in row for row in rows_of("benchmarks/RESULTS.md", directory.name))


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_soft_prompt_beats_whatever_needs_no_training(directory: Path) -> None:
    card = (directory / "README.md").read_text(encoding="utf-8")
    for baseline in ("zero-shot", "instruction", "4-shot"):
        assert re.search(rf"^- {directory.name} is better than {baseline}: ", card, re.MULTILINE), baseline


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_whoever_made_the_data_is_named(directory: Path) -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert f"\n{directory.parent.name}/{directory.name}\n" in notice
