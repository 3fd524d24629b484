"""`prelude inspect` prints a verdict first, and draws what it measured."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from server.cli.inspection_tables import print_causal, print_similarity, print_static
from server.cli.main import app
from server.engine.model.frozen import FrozenModel
from server.interpret.pictures import draw
from server.interpret.pictures_of_tokens import written
from server.interpret.results import (
    MOST_TOP,
    CausalInterpretation,
    Interpretation,
    Interval,
    LadderStep,
    Necessity,
    Removal,
    Spread,
    Sufficiency,
)
from server.interpret.section import card_section
from server.interpret.static import Interpreter
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.interpret.support import begun_at, planted, token_states
from tests.support import random_kv_prompt, random_soft_prompt
from tests.train.rows import MOODS, write_rows

START = (3, 40, 41, 250)
ONE = Interval(value=0.5, low=0.4, high=0.6)
CAUSAL = CausalInterpretation(
    task="mood",
    digest="0",
    data="rows",
    data_sha256="0",
    rows=4,
    metric="accuracy",
    verdict="The words explain it.",
    sufficiency=Sufficiency(learned=ONE, none=ONE, steps=(LadderStep(name="start", quality=ONE, ratio=ONE),)),
    necessity=Necessity(
        replaced_by="its start",
        tokens=(Removal(token=0, loss=ONE, p=0.002, effect="needed"),),
        null=Spread(mean=0, sd=0, low=0, high=0, top=0),
        needed=(0,),
        harmful=(),
    ),
)


def printed(*results: Interpretation | CausalInterpretation) -> str:
    out = io.StringIO()
    console = Console(file=out, width=1000)
    for result in results:
        if isinstance(result, Interpretation):
            print_static(result, console)
        else:
            print_causal(result, console)
    return out.getvalue()


def interpret_planted(model: FrozenModel) -> Interpretation:
    return Interpreter(model).interpret("planted", planted(model, (58, 60, 62, 70), START))


def moved(model: FrozenModel) -> SoftPrompt:
    tensor = token_states(model, START) + 0.1 * random_kv_prompt(model.spec, 4).tensor
    return SoftPrompt("PREFIX_TUNING", tensor, begun_at(START, ("yes", "no")))


def test_the_verdict_comes_first_and_tokens_are_shown_literally(tiny32: FrozenModel) -> None:
    shown = printed(interpret_planted(tiny32))
    assert shown.splitlines()[0].startswith("All 4 virtual tokens are word-like and learned: what training added")
    assert "'['" in shown
    assert printed(CAUSAL).splitlines()[1] == "The words explain it."


@pytest.mark.parametrize("kind", ["kv", "foreign kv", "foreign embeddings"])
def test_every_kind_is_printed_and_its_json_form_is_read_again(tiny32: FrozenModel, kind: str) -> None:
    made = {
        "kv": moved(tiny32),
        "foreign kv": random_kv_prompt(tiny32.spec),
        "foreign embeddings": random_soft_prompt(tiny32.spec),
    }
    found = Interpreter(tiny32).interpret("x", made[kind])
    assert "Effective rank" in printed(found)
    assert Interpretation.model_validate(json.loads(found.model_dump_json())) == found


def test_all_that_was_measured_is_drawn(tiny32: FrozenModel, tmp_path: Path) -> None:
    interpreter = Interpreter(tiny32)
    similarity = interpreter.compare([("a", moved(tiny32)), ("b", random_kv_prompt(tiny32.spec))])
    print_similarity(similarity, Console(file=io.StringIO()))
    static = interpreter.interpret("mood", moved(tiny32))
    drawn = draw(tmp_path, static=static, causal=CAUSAL, similarity=similarity)
    assert {path.stem for path in drawn} == {"lens", "change", "sufficiency", "necessity", "similarity"}
    assert all("<svg" in path.read_text() for path in drawn)


def test_tokens_are_drawn_as_a_table_and_a_map_whatever_characters_they_have(
    tiny32: FrozenModel, tmp_path: Path
) -> None:
    """Warnings, such as of a character without a glyph, are errors."""
    known = interpret_planted(tiny32)
    assert {path.stem for path in draw(tmp_path, static=known)} == {"tokens", "map"}
    foreign = Interpreter(tiny32).interpret("x", random_soft_prompt(tiny32.spec))
    assert {path.stem for path in draw(tmp_path, static=foreign)} == {"tokens", "map"}
    assert written(" $a_b$ 中\n") == "␣$a_b$␣\\u4e2d\\n"


def test_the_map_shows_starts_and_values_and_how_much_it_leaves_out(tiny32: FrozenModel) -> None:
    found = interpret_planted(tiny32).vocabulary_map
    assert found is not None
    assert len(found.start) == len(found.learned) == len(START)
    assert found.start != found.learned
    assert 0 < found.variance[1] <= found.variance[0] < 1
    embedded = tiny32.embed(torch.arange(258)).detach().double()
    variances = torch.linalg.eigvalsh(torch.cov(embedded.T)).flip(0)
    assert found.variance[0] == pytest.approx(float(variances[0] / variances.sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["a", "b"], "--compare takes at least two tasks"),
        (["a", "--compare"], "--compare takes at least two tasks"),
        (["a", "b", "a", "--compare"], "'a' is named twice. Name each soft prompt once."),
        (["a", "--data", "x", "--measures", "beauty"], "There is no measure 'beauty'. Name sufficiency or necessity"),
        (["a", "--data", "x", "--measures", ","], "--measures names no measure. Name sufficiency or necessity"),
        (["a", "--measures", "necessity"], "--measures is for experiments, and experiments need rows. Give rows with"),
        (["a", "--limit", "3"], "--limit is for experiments, and experiments need rows. Give rows with --data"),
        (["a", "b", "--compare", "--data", "x"], "--data is for experiments with one soft prompt"),
        (["a", "--top", str(MOST_TOP + 1)], f"should be less than or equal to {MOST_TOP}"),  # as HTTP refuses it
    ],
)
def test_contradictions_are_refused_before_the_model_is_loaded(words: list[str], reason: str) -> None:
    result = CliRunner().invoke(app, ["inspect", *words])
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["inspect", "moods"], "There is no task 'moods'. Did you mean mood? The inbox prompts holds mood;"),
        (["inspect", "mood", "moods", "--compare"], "There is no task 'moods'"),
        (["inspect", "mood@1"], "There is no store at file:prompts/.store"),
        (["inspect", "plain"], "plain is no soft prompt: it has no adapter_config.json. Name a directory"),
        (["inspect", "./absent"], "There is no directory absent. Name a directory that PEFT"),
        (["inspect", "mood", "--data", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["inspect", "mood", "--json", "plain"], "plain is a directory, and --json names a file. Write --json plain/"),
        (["inspect", "mood", "--json", "file/x.json"], "file cannot be written: File exists. Name another path"),
        (["inspect", "mood", "--svg", "file"], "file cannot be written: File exists. Name another path with --svg"),
        (["prune", "moods", "--data", "rows.jsonl"], "There is no task 'moods'. Did you mean mood?"),
        (["prune", "mood@1", "--data", "rows.jsonl"], "There is no store at file:prompts/.store"),
        (["prune", "mood", "--data", "rows.jsonl", "--json", "plain"], "plain is a directory, and --json names a file"),
        (["eval", "moods", "--data", "rows.jsonl"], "There is no task 'moods'. Did you mean mood?"),
        (["eval", "mood@1", "--data", "rows.jsonl"], "There is no store at file:prompts/.store"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused_before_the_model_is_loaded(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(settings: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("server.engine.build_engine.load_engine", load)
    monkeypatch.chdir(tmp_path)
    for folder in ("prompts/mood", "plain"):
        Path(folder).mkdir(parents=True)
    Path("file").touch()
    write_rows(Path("rows.jsonl"), MOODS * 6)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result
    assert reason in " ".join(result.output.split())


def test_a_card_shows_the_verdict_the_tests_and_the_pictures_that_there_are(tiny32: FrozenModel) -> None:
    static = Interpreter(tiny32).interpret("mood", moved(tiny32))
    section = card_section(static, CAUSAL, {"lens", "necessity"})
    first, _, rest = section.removeprefix("## What it means\n\n").partition("\n\n")
    assert first.split() == static.verdict.split()
    assert rest.startswith("| value-change lens |")
    assert all(len(line) <= 120 for line in section.splitlines() if not line.startswith("|"))
    assert "The words explain it." in section
    assert "](lens.svg)" in section
    assert "](sufficiency.svg)" not in section
    assert "| start | 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600) |" in section
    assert "| 0 | 0.500 (0.400 to 0.600) | 0.002 | needed |" in section
