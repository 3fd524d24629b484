from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server import __version__
from server.cli import app
from server.contracts import ModelSpec
from server.engine.model.frozen import FrozenModel
from server.registry.objects import open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import ENV_PREFIX, Settings
from server.soft_prompts.formats import load_soft_prompts, save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.processes import COMMAND, start_forked
from tests.support import random_soft_prompt
from tests.train.rows import MOODS, write_rows

TRAINING = ("--steps", "160", "--batch-size", "4", "--lr", "0.3", "--evaluations", "4")
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.fixture(scope="session")
def model_directory(tiny32: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as PRELUDE_MODEL can name it."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny32.module.save_pretrained(directory)
    tiny32.tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


@pytest.fixture
def workplace(workplace: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with data files to stand in, and an environment that names the tiny model."""
    variables = {"MODEL": str(model_directory), "DTYPE": "float32", "MAX_MODEL_LEN": "128"}
    for name, value in variables.items():
        monkeypatch.setenv(ENV_PREFIX + name, value)
    write_rows(workplace / "train.jsonl", MOODS * 5)
    write_rows(workplace / "test.jsonl", MOODS)
    return workplace


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the soft prompt that was trained once is kept."""
    return tmp_path_factory.mktemp("shelf") / "mood"


@pytest.fixture
def mood(workplace: Path, shelf: Path) -> Path:
    """A task of the inbox that answers MOODS."""
    if not shelf.exists():
        assert train(*TRAINING, "--out", str(shelf)).exit_code == 0
    return Path(shutil.copytree(shelf, workplace / "prompts/mood"))


def prelude(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def train(*arguments: str, task: str = "mood") -> Result:
    return prelude("train", task, "--data", "train.jsonl", "--validation", "test.jsonl", *arguments)


def refused(result: Result) -> str:
    """What a command says that refuses: an error, what to do about it, exit status 2, and no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    error, remedy = [line for line in result.stderr.splitlines() if line][-2:]
    assert error.startswith("error: ")
    assert remedy.startswith("       ")
    assert result.stdout == ""
    return result.stderr


def test_what_is_trained_is_evaluated_and_nothing_else_is_written(workplace: Path, shelf: Path) -> None:
    trained = train(*TRAINING)
    assert trained.exit_code == 0, trained.output
    assert trained.stdout.startswith("step 40: validation exact match ")
    last = r"\nprompts/mood: validation exact match 100\.0%, loss 0\.\d{4} \(step 160\)\n$"
    assert re.search(last, trained.stdout)
    if not shelf.exists():
        shutil.copytree(workplace / "prompts/mood", shelf)
    written = sorted(path.relative_to(workplace) for path in workplace.rglob("*"))
    evaluated = prelude("eval", "mood", "--data", "test.jsonl")
    assert evaluated.exit_code == 0, evaluated.output
    first, *lines = evaluated.stdout.splitlines()
    assert first == "mood on 4 rows of test.jsonl, tiny in float32"
    (figures,) = [line.split() for line in lines if line.startswith("mood ")]
    assert figures[:9] == ["mood", *["100.0", "%"] * 4]
    assert [line.split() for line in lines if line.startswith(("no ", "yes "))] == [["no", "2", "2"], ["yes", "2", "2"]]
    assert sorted(path.relative_to(workplace) for path in workplace.rglob("*")) == written


def test_json_is_the_last_line_and_holds_the_figures(workplace: Path, mood: Path) -> None:
    write_rows(workplace / "test.jsonl", [*MOODS, ("good", "no")])
    lines = prelude("eval", "mood", "--data", "test.jsonl", "--json").stdout.splitlines()
    figures = json.loads(lines[-1])
    assert (figures["task"], figures["model"], figures["dtype"], figures["rows"]) == ("mood", "tiny", "float32", 5)
    assert figures["contestants"]["mood"]["accuracy_choices"]["value"] == 0.8
    assert figures["labels"] == {"no": {"correct": 2, "rows": 3}, "yes": {"correct": 2, "rows": 2}}
    assert figures["digest"] == json.loads((mood / "manifest.json").read_text())["digest"]
    assert set(figures["contestants"]) == {"mood"}


def test_a_directory_can_be_evaluated_instead_of_the_inbox_and_only_some_rows(workplace: Path, mood: Path) -> None:
    (workplace / "elsewhere").mkdir()
    mood.rename(workplace / "elsewhere/first")
    mood.parent.rmdir()
    assert not (workplace / "prompts").exists()
    result = prelude("eval", "mood", "--data", "test.jsonl", "--soft-prompt", "elsewhere/first", "--limit", "3")
    assert "mood on 3 rows of test.jsonl" in result.stdout


def test_baselines_are_measured_beside_it_with_what_lies_beside_the_data(workplace: Path, mood: Path) -> None:
    (workplace / "meta.json").write_text('{"instruction": "Is it good?"}')
    write_rows(workplace / "train.jsonl", [("nice", "yes"), ("nasty", "no")])
    baselines = ("--baselines", "zero-shot, instruction,2-shot")
    result = prelude("eval", "mood", "--data", "test.jsonl", *baselines, "--json")
    assert result.exit_code == 0, result.output
    assert " zero-shot: accuracy " in result.stdout
    figures = json.loads(result.stdout.splitlines()[-1])
    assert list(figures["contestants"]) == ["mood", "zero-shot", "instruction", "2-shot"]
    assert figures["instruction"] == "Is it good?"


def test_a_baseline_without_what_it_needs_is_refused_rather_than_left_out(workplace: Path, mood: Path) -> None:
    evaluate = ("eval", "mood", "--data", "test.jsonl", "--baselines")
    assert "needs an instruction" in refused(prelude(*evaluate, "instruction"))
    assert "There is no baseline 'few'" in refused(prelude(*evaluate, "few"))
    (workplace / "train.jsonl").unlink()
    assert "there is no train.jsonl beside the data" in refused(prelude(*evaluate, "2-shot"))


def stored_versions(workplace: Path, model: ModelSpec, *soft_prompts: SoftPrompt) -> None:
    """Versions in the store that the settings name."""
    registry = Registry(Store(open_objects(Settings.load().store_url)), model, 512)
    for soft_prompt in soft_prompts:
        registry.publish("mood", [soft_prompt], "api")


def test_two_versions_of_the_store_are_compared_in_a_sentence(workplace: Path, mood: Path, tiny32: FrozenModel) -> None:
    (trained,) = load_soft_prompts(mood, tiny32.spec, 512)
    poor = random_soft_prompt(tiny32.spec, manifest={"labels": ["no", "yes"], "generation": {"max_new_tokens": 4}})
    stored_versions(workplace, tiny32.spec, poor, trained, poor)
    write_rows(workplace / "test.jsonl", MOODS * 6)
    compared = prelude("eval", "mood", "--data", "test.jsonl", "--compare", "1", "2")
    assert compared.exit_code == 0, compared.output
    assert re.search(
        r"^version 2 is better than 1: accuracy \+\d+\.\d points \(95 % interval ", compared.stdout, re.MULTILINE
    )
    worse = prelude("eval", "mood", "--data", "test.jsonl", "--compare", "2", "3")
    assert re.search(r"^version 3 is worse than 2: accuracy -", worse.stdout, re.MULTILINE)
    same = prelude("eval", "mood@1", "--data", "test.jsonl", "--baselines", "@3")
    assert "no difference shown between version 1 and 3: accuracy +0.0 points" in same.stdout
    assert "macro-F1: no difference shown, +0.0 points" in same.stdout


def test_a_comparison_without_a_store_makes_none(workplace: Path) -> None:
    assert "There is no store at file:prompts/.store" in refused(
        prelude("eval", "mood", "--data", "test.jsonl", "--compare", "1", "2")
    )
    assert not (workplace / "prompts").exists()


def test_a_card_is_written_only_where_it_is_asked_for(workplace: Path, mood: Path) -> None:
    before = (mood / "manifest.json").read_text()
    assert prelude("eval", "mood", "--data", "test.jsonl", "--card").exit_code == 0
    card = (mood / "README.md").read_text()
    assert "# mood" in card
    assert "    PRELUDE_DTYPE=float32 prelude eval mood --data test.jsonl\n" in card
    metrics = json.loads((mood / "manifest.json").read_text())["metrics"]
    assert metrics["test_accuracy_choices"] == 1.0
    assert set(json.loads(before)["metrics"]) < set(metrics)
    (mood / "README.md").write_text("mine")
    message = refused(prelude("eval", "mood", "--data", "test.jsonl", "--card"))
    assert "README.md was not written by `prelude eval`" in message


def test_an_unknown_task_is_refused_with_those_that_there_are(workplace: Path) -> None:
    assert train("--steps", "1").exit_code == 0
    message = refused(prelude("eval", "moods", "--data", "test.jsonl"))
    assert "There is no task 'moods'. Did you mean mood?" in message
    assert "The inbox prompts holds mood; PRELUDE_PROMPTS_DIR names another inbox." in message


def test_a_task_that_cannot_be_served_is_refused_with_the_reason(workplace: Path) -> None:
    assert train("--steps", "1").exit_code == 0
    (workplace / "prompts/mood/adapter_model.safetensors").unlink()
    message = refused(prelude("eval", "mood", "--data", "test.jsonl"))
    assert "prompts/mood cannot be served." in message
    assert "adapter_model.safetensors is missing." in message


def test_a_directory_that_does_not_exist_is_refused_by_name(workplace: Path) -> None:
    message = refused(prelude("eval", "mood", "--data", "test.jsonl", "--soft-prompt", "none"))
    assert "There is no directory none." in message


@pytest.mark.parametrize("task", ["Mood", "a b", "tiny/mood"])
def test_a_name_that_no_task_can_have_is_refused(workplace: Path, task: str) -> None:
    assert "cannot be the name of a task" in refused(train(task=task))
    assert "cannot be the name of a task" in refused(prelude("eval", task, "--data", "test.jsonl"))


def test_bad_data_is_refused_by_line_before_a_model_is_loaded(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELUDE_MODEL", "/none/at/all")
    (workplace / "bad.jsonl").write_text("{}\n")
    assert "bad.jsonl, line 1: no string field 'input'" in refused(prelude("eval", "mood", "--data", "bad.jsonl"))
    assert "none.jsonl cannot be read" in refused(prelude("eval", "mood", "--data", "none.jsonl"))


def test_a_row_beyond_the_context_is_refused_by_line(workplace: Path) -> None:
    assert train("--steps", "1").exit_code == 0
    write_rows(workplace / "long.jsonl", [*MOODS, ("x" * 200, "yes")])
    message = refused(prelude("eval", "mood", "--data", "long.jsonl"))
    assert "long.jsonl, line 5: " in message
    assert "raise PRELUDE_MAX_MODEL_LEN" in message


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--validation", "none.jsonl"], "1 data files and 2 validation files"),
        (["--data", "test.jsonl"], "Several data files are the tasks of multitask prompt tuning"),
        (["--init", "other"], "--init is 'other': Input should be 'auto', 'labels'"),
        (["--init", "random", "--method", "prefix_tuning"], "train badly"),
        (["--label", "yes"], "Labels are named for distillation only"),
        (["--teacher", "none.txt"], "none.txt cannot be read"),
        (["--lr", "fast"], "Give a number, 0.02 is usual, or auto."),
        (["--lr", "inf"], "--lr is inf: Input should be less than or equal to 1000000"),
        (["--init", "text"], "init is 'text', and there is no text to begin with"),
        (["--init-text", "Good?"], "init is 'auto', and there is a text to begin with"),
        (["--init-from", "prompts"], "init is 'auto', and there is a soft prompt to begin with"),
        (["--teacher-chat"], "There is no teacher's text to send"),
        (["--input-template", "no field"], "does not hold {input} exactly once"),
        (["--num-virtual-tokens", "600"], "this server takes 1 to 512"),
        (["--out", "train.jsonl/mood"], "cannot be written to train.jsonl/mood"),
    ],
)
def test_training_that_cannot_work_is_refused_with_a_remedy(
    workplace: Path, arguments: list[str], problem: str
) -> None:
    files = sorted(workplace.rglob("*"))
    assert problem in refused(train("--steps", "5", *arguments))
    assert sorted(workplace.rglob("*")) == files


def test_a_run_that_is_over_leaves_the_checkpoints_of_others(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PREFIX + "CACHE_DIR", str(workplace / "cache"))
    checkpoints = workplace / "cache/training/mood"
    other, old = checkpoints / "other", checkpoints / "old"
    for folder in (other, old):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert train("--steps", "1", "--lr", "0.01").exit_code == 0
    assert list(checkpoints.iterdir()) == [other]


def test_a_run_says_what_it_read_and_what_its_result_takes_the_place_of(workplace: Path) -> None:
    first = train("--steps", "1", "--lr", "0.01")
    assert "train.jsonl: 20 rows to learn from, 4 to measure on; labels no, yes" in first.stderr
    assert "how well they were learned by heart" in first.stderr
    assert "what was there before" not in first.stdout
    assert re.search(r"\(step 1\); what was there before had \d+\.\d%$", train("--steps", "1", "--lr", "0.02").stdout)


def test_a_template_is_written_with_the_escapes_of_a_shell_s_user(workplace: Path) -> None:
    assert train("--steps", "1", "--input-template", "Text:\\t{input}\\nLabel:").exit_code == 0
    manifest = json.loads((workplace / "prompts/mood/manifest.json").read_text())
    assert manifest["input_template"] == "Text:\t{input}\nLabel:"


@pytest.mark.parametrize("command", ["serve", "train", "eval"])
def test_a_misspelt_variable_is_refused_by_every_command(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("PRELUDE_PROT", "1")
    result = {"serve": lambda: prelude("serve"), "train": train}.get(
        command, lambda: prelude("eval", "mood", "--data", "test.jsonl")
    )()
    assert "Not a setting: PRELUDE_PROT." in refused(result)


def test_a_model_that_does_not_exist_is_refused(workplace: Path) -> None:
    assert "PRELUDE_MODEL names /none/at/all" in refused(prelude("serve", "--model", "/none/at/all"))


def test_an_unknown_option_is_refused(workplace: Path) -> None:
    result = prelude("serve", "--prot", "1")
    assert result.exit_code == 2
    assert "--prot" in result.stderr


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ([], ["serve", "train", "eval"]),
        (["serve"], ["--port", "PRELUDE_PORT", "--kv-memory", "such as 2GiB"]),
        (["train"], ['{"input": "…", "target": "…"}', "prompts/TASK", "labels, vocab (sampled)", "auto tries"]),
        (
            ["eval"],
            ["serving engine", "--baselines", "--compare", "--card", "--soft-prompt", "--limit", "--json", "greedy"],
        ),
    ],
)
def test_help_teaches_what_a_command_takes(command: list[str], taught: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 0
    assert [text for text in taught if text not in result.stdout] == []


def test_help_answers_without_loading_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_refusal_in_a_real_process_shows_no_traceback(workplace: Path) -> None:
    log = workplace / "log.txt"
    assert start_forked(COMMAND, ["eval", "mood", "--data", "none.jsonl"], dict(os.environ), log).wait(60) == 2
    assert log.read_text().splitlines() == [
        "error: none.jsonl cannot be read: No such file or directory.",
        "       Check the path.",
    ]


def test_a_broken_entry_of_the_inbox_is_in_nobody_else_s_way(workplace: Path, tiny32: FrozenModel) -> None:
    save_soft_prompt(workplace / "prompts/plain", random_soft_prompt(tiny32.spec), tiny32.spec)
    (workplace / "prompts/broken").mkdir()
    (workplace / "prompts/broken/adapter_config.json").write_text("{")
    result = prelude("eval", "plain", "--data", "test.jsonl", "--limit", "2")
    assert result.exit_code == 0, result.output
    assert "plain on 2 rows of test.jsonl" in result.stdout


def test_the_version_is_printed_without_a_command() -> None:
    result = prelude("--version")
    assert (result.exit_code, result.output) == (0, f"prelude {__version__}\n")
