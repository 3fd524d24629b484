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


def manifest_of(directory: Path) -> Manifest:
    return Manifest.parse((directory / "manifest.json").read_bytes())


def card_of(directory: Path) -> str:
    """What `prelude eval` wrote."""
    return (directory / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


DISTILLED = [path for path in SHIPPED if "teacher_template" in (manifest_of(path).training or {})]
TAUGHT = [path for path in SHIPPED if path not in DISTILLED]


@pytest.mark.parametrize("directory", TAUGHT, ids=lambda path: path.name)
def test_a_shipped_soft_prompt_has_the_figure_of_its_card_in_readme_and_results(directory: Path) -> None:
    [told] = rows_of("README.md", directory.name)
    [metric] = [metric for metric in HEADLINES if f"| {metric.title} |" in told]
    value = (manifest_of(directory).metrics or {})[f"test_{metric.key}"]
    figure = f"{100 * value:.1f} %" if metric.is_share else f"{value:.1f}"
    cell = cell_of(card_of(directory), f"**{directory.name}**", metric.title)
    assert cell.startswith(f"{figure} (")
    assert f"| {figure} |" in told
    assert any(f"| {cell} |" in row for row in rows_of("benchmarks/RESULTS.md", directory.name))


@pytest.mark.parametrize("directory", TAUGHT, ids=lambda path: path.name)
def test_a_shipped_soft_prompt_beats_whatever_needs_no_training(directory: Path) -> None:
    for baseline in ("zero-shot", "instruction", "4-shot"):
        sentence = rf"^- {directory.name} is better than {baseline}: "
        assert re.search(sentence, card_of(directory), re.MULTILINE), baseline


@pytest.mark.parametrize("directory", DISTILLED, ids=lambda path: path.name)
def test_a_distilled_soft_prompt_agrees_with_the_text_that_it_stands_for(directory: Path) -> None:
    """On nine labels of ten, at an eighth of the tokens; the text lies beside it, to be asked again."""
    manifest = manifest_of(directory)
    training = manifest.training or {}
    assert (directory / "teacher.txt").read_text(encoding="utf-8") == training["teacher_template"]
    [(share, interval)] = re.findall(
        r"chooses the same label as teacher on ([\d.]+) % of the rows \(95 % interval (.*)\)$",
        card_of(directory),
        re.MULTILINE,
    )
    assert float(share) >= 90
    [told] = rows_of("README.md", directory.name)
    assert f"| {share} % |" in told
    assert any(f"{share} % ({interval})" in row for row in rows_of("benchmarks/RESULTS.md", directory.name))
    [tokens] = re.findall(r"text of (\d+) tokens", told)
    assert manifest.num_virtual_tokens is not None
    assert manifest.num_virtual_tokens <= int(tokens) / 8


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_whoever_made_the_data_is_named(directory: Path) -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert f"\n{directory.parent.name}/{directory.name}\n" in notice
