from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import InvalidSoftPrompt, ServerDraining, StoreError
from server.registry import inbox as inbox_module
from server.soft_prompts import formats
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.peft_files import CONFIG, TENSORS
from tests.registry.inbox import Home, digest, live


def test_a_broken_entry_is_reported_and_the_others_are_served(home: Home) -> None:
    for name in ("a", "b", "c"):
        home.drop(name, 1)
    (home.prompts / "b" / TENSORS).write_bytes(b"\0" * 100)
    registry = home.restart()
    assert live(registry) == {"a": 1, "c": 1}
    assert list(registry.errors) == ["b"]
    assert "not a safetensors file" in registry.errors["b"]


@pytest.mark.timeout(20)  # what waits for a writer waits for ever
def test_a_pipe_in_the_place_of_a_file_holds_up_nobody(home: Home) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)
    (home.prompts / "a" / CONFIG).unlink()
    os.mkfifo(home.prompts / "a" / CONFIG)
    server = home.server()
    assert live(server.scan()) == {"b": 1}
    assert "not a regular file" in server.registry.errors["a"]
    home.drop("a", 1)
    assert live(server.scan()) == {"a": 1, "b": 1}
    assert server.registry.errors == {}


def test_an_entry_that_broke_leaves_its_last_good_version_live(home: Home) -> None:
    good = home.drop("a", 1)
    server = home.server()
    server.scan()
    (home.prompts / "a" / CONFIG).unlink()
    for registry in (server.scan(), home.restart()):
        assert digest(registry, "a") == good.digest
        assert "adapter_config.json is missing" in registry.errors["a"]
    home.drop("a", 1)
    registry = server.scan()
    assert registry.errors == {}
    assert live(registry) == {"a": 1}


def test_an_entry_that_is_gone_is_no_longer_reported(home: Home) -> None:
    home.drop("a", 1)
    (home.prompts / "a" / CONFIG).write_text("{")
    server = home.server()
    assert list(server.scan().errors) == ["a"]
    home.remove("a")
    assert server.scan().errors == {}


def test_a_directory_whose_name_no_task_can_have_is_reported(home: Home) -> None:
    for name in ("My Task", home.model.name, "a"):
        home.drop(name, 1)
    registry = home.restart()
    assert live(registry) == {"a": 1}
    assert "[a-z0-9]" in registry.errors["My Task"]
    assert "frozen model" in registry.errors[home.model.name]


def test_an_entry_whose_name_is_not_text_is_reported_as_text(home: Home) -> None:
    entry = os.fsencode(home.prompts) + b"/bad\xff"
    os.makedirs(entry)  # noqa: PTH103
    Path(os.fsdecode(entry), CONFIG).write_text("{}")
    registry = home.restart()
    assert [name.encode() for name in registry.errors] == [b"bad\\xff"]
    registry.errors["bad\\xff"].encode()


def test_an_entry_that_cannot_be_read_for_now_is_reported_and_not_retired(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.drop("a", 1)
    home.drop("b", 1)
    server = home.server()
    server.scan()
    changed = home.drop("b", 2)

    def refusing(real: Callable[[Path], object]) -> Callable[[Path], object]:
        def refuse(path: Path) -> object:
            if path == home.prompts / "a":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return refuse

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing(os.scandir))
        patch.setattr(os, "listdir", refusing(os.listdir))
        server.scan()
        registry = server.scan()
        assert "Permission denied" in registry.errors["a"]
        assert digest(registry, "b") == changed.digest
    assert live(registry) == {"a": 1, "b": 2}
    assert server.scan().errors == {}


def test_a_link_that_leads_nowhere_for_now_is_reported_and_not_retired(home: Home, tmp_path: Path) -> None:
    home.drop("a", 1)
    os.rename(home.prompts / "a", tmp_path / "elsewhere")
    (home.prompts / "a").symlink_to(tmp_path / "elsewhere")
    (home.prompts / "loop").symlink_to("loop")
    server = home.server()
    server.scan()
    os.rename(tmp_path / "elsewhere", tmp_path / "away")
    server.scan()
    registry = server.scan()
    assert live(registry) == {"a": 1}
    assert "No such file" in registry.errors["a"]
    assert "symbolic links" in registry.errors["loop"]
    os.rename(tmp_path / "away", tmp_path / "elsewhere")
    assert "a" not in server.scan().errors
    assert home.num_events == 1


def test_a_bug_in_reading_one_entry_does_not_keep_the_others_from_being_served(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)

    def fail(path: Path, *args: object) -> list[SoftPrompt]:
        if path.name == "a":
            raise ZeroDivisionError("oops")
        return formats.load_soft_prompts(path, home.model, 32)

    monkeypatch.setattr(inbox_module, "load_soft_prompts", fail)
    server = home.server()
    server.scan()
    registry = server.scan()
    assert live(registry) == {"b": 1}
    assert "oops" in registry.errors["a"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("error", [StoreError, ServerDraining])
def test_an_error_that_is_not_the_entrys_fault_is_tried_again_and_logged_once(
    home: Home, caplog: pytest.LogCaptureFixture, error: type[StoreError | ServerDraining]
) -> None:
    home.drop("a", 1)
    server = home.server()
    attempts: list[str] = []

    def refuse(soft_prompt: SoftPrompt) -> None:
        attempts.append(soft_prompt.digest)
        raise error(f"Not now, {len(attempts)}.")

    server.engine.on_warm = refuse
    for _ in range(3):
        server.scan()
    assert len(attempts) == 3
    assert len(caplog.records) == 1
    assert "Not now, 3" in server.registry.errors["a"]
    server.engine.on_warm = lambda soft_prompt: None
    assert live(server.scan()) == {"a": 1}
    assert server.registry.errors == {}


def test_what_the_engine_cannot_use_is_tried_once(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    attempts: list[str] = []

    def refuse(soft_prompt: SoftPrompt) -> None:
        attempts.append(soft_prompt.digest)
        raise InvalidSoftPrompt("It is not finite.")

    server.engine.on_warm = refuse
    server.scan()
    server.scan()
    assert len(attempts) == 1
    assert "not finite" in server.registry.errors["a"]


def test_an_entry_that_is_written_to_while_it_is_read_is_read_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.drop("a", 1)
    server = home.server()
    changed: list[SoftPrompt] = []

    def load(path: Path, *args: object) -> list[SoftPrompt]:
        found = formats.load_soft_prompts(path, home.model, 32)
        if not changed:
            changed.append(home.drop("a", 2))
        return found

    monkeypatch.setattr(inbox_module, "load_soft_prompts", load)
    assert live(server.scan()) == {}
    assert digest(server.scan(), "a") == changed[0].digest
    assert home.num_events == 1
