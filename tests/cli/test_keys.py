from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.keys.file import read_keys
from server.keys.key import Scope
from server.keys.live import ApiKeys


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def create(*arguments: str) -> Result:
    result = keys("create", "--file", "keys.json", *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


def test_standard_output_is_the_key_alone_and_a_server_knows_it() -> None:
    result = create("--name", "ci", "--scope", "publish", "--scope", "generate", "--tasks", "team-a-*")
    assert re.fullmatch(r"prelude_[0-9a-f]{8}_[0-9a-f]{64}\n", result.stdout)
    found = ApiKeys(Path("keys.json")).find(result.stdout.strip())
    assert found is not None
    assert (found.name, found.scopes, found.tasks) == ("ci", (Scope.PUBLISH, Scope.GENERATE), ("team-a-*",))
    assert stat.S_IMODE(Path("keys.json").stat().st_mode) == 0o600


def test_hints_tell_what_the_key_may_and_how_to_send_it_but_not_the_key() -> None:
    result = create("--name", "ci", "--scope", "publish", "--tasks", "a-*", "--tasks", "b")
    key = read_keys(Path("keys.json"))[0]
    assert f"keys.json: key {key.id} (ci): publish for a-*, b.\n" in result.stderr
    assert "Authorization: Bearer KEY" in result.stderr
    assert "shown only now" in result.stderr
    assert result.stdout.split("_")[2].strip() not in result.stderr


def test_list_shows_every_key_and_no_hash() -> None:
    create("--name", "ci", "--scope", "publish", "--tasks", "team-a-*")
    create("--name", "ada's 日本語", "--scope", "admin")
    first, second = read_keys(Path("keys.json"))
    since = f"{first.created_at:%Y-%m-%d}"
    assert keys("list", "--file", "keys.json").stdout.splitlines() == [
        "id        name          scopes   tasks     since",
        f"{first.id}  ci            publish  team-a-*  {since}",
        f"{second.id}  ada's 日本語  admin    all       {since}",  # three characters, six columns of a terminal
    ]


def test_a_revoked_key_is_gone_and_an_empty_file_says_so() -> None:
    create("--name", "ci", "--scope", "publish")
    key = read_keys(Path("keys.json"))[0]
    result = keys("revoke", key.id, "--file", "keys.json")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"keys.json: key {key.id} (ci) is revoked.\n"
    result = keys("list", "--file", "keys.json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "keys.json holds no key.\n")


def test_a_whole_key_is_no_id_and_is_not_repeated() -> None:
    text = create("--name", "ci", "--scope", "publish").stdout.strip()
    message = refused(keys("revoke", text, "--file", "keys.json"))
    assert "no key of that id" in message
    assert text.split("_")[2] not in message


def test_the_file_of_the_settings_is_taken_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELUDE_API_KEYS_FILE", "ours.json")
    assert keys("create", "--name", "ci", "--scope", "admin").exit_code == 0
    key = read_keys(Path("ours.json"))[0]
    assert key.id in keys("list").stdout
    assert keys("revoke", key.id).exit_code == 0
    assert read_keys(Path("ours.json")) == ()


@pytest.mark.parametrize("by_variable", [True, False])
def test_the_file_may_lie_in_the_home_that_no_shell_has_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    if by_variable:
        monkeypatch.setenv("PRELUDE_API_KEYS_FILE", "~/keys.json")
    result = keys("create", "--name", "ci", "--scope", "admin", *([] if by_variable else ["--file=~/keys.json"]))
    assert result.exit_code == 0, result.output
    assert len(read_keys(tmp_path / "home/keys.json")) == 1


@pytest.mark.parametrize("command", [["create", "--name", "ci", "--scope", "admin"], ["list"], ["revoke", "4f0c9a1e"]])
def test_without_any_file_a_command_says_how_to_name_one(command: list[str]) -> None:
    assert "Give --file keys.json, or set PRELUDE_API_KEYS_FILE." in refused(keys(*command))


@pytest.mark.parametrize("file", [["--file", "keys.json"], []])
def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch, file: list[str]) -> None:
    monkeypatch.setenv("PRELUDE_API_KEY_FILE", "keys.json")
    assert "Not a setting: PRELUDE_API_KEY_FILE." in refused(keys("list", *file))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--scope", "admin", "--tasks", "a"], "leave out its task patterns"),
        (["--scope", "publish", "--tasks", "Team A"], "tasks 1: this is no task's name"),
        (["--scope", "publish", "--name", "two\nlines"], "name: a key is called by 1 to 100 characters on one line"),
        (["--scope", "publish", "--name", ""], "name: a key is called by 1 to 100 characters on one line"),
        (["--scope", "publish", "--scope", "publish"], "it contains a duplicate"),
        (["--scope", "everything"], "'everything' is not one of"),
        ([], "--scope"),
    ],
)
def test_a_key_that_cannot_be_is_refused_and_nothing_is_written(arguments: list[str], problem: str) -> None:
    message = refused(keys("create", "--file", "keys.json", "--name", "ci", *arguments))
    assert problem in " ".join(message.replace("│", " ").split())
    assert list(Path().iterdir()) == []


def test_help_teaches_with_an_example_that_works() -> None:
    result = CliRunner().invoke(app, ["keys", "create", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    for text in ("--scope", "generate", "publish", "admin", "--tasks", "'team-a-*'", "PRELUDE_API_KEYS_FILE"):
        assert text in result.stdout
    example = next(line for line in result.stdout.splitlines() if "prelude keys create --file" in line)
    _, *arguments = shlex.split(example.split(">")[0])
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert read_keys(Path("keys.json"))[0].tasks == ("team-a-*",)


def test_the_group_says_how_to_start_a_server_with_the_file() -> None:
    result = CliRunner().invoke(app, ["keys", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    for text in ("create", "list", "revoke", "prelude serve --api-keys-file keys.json"):
        assert text in result.stdout
