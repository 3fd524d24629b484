from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigurationError
from server.keys.file import add_key, read_keys, revoke_key
from server.keys.key import ApiKey, Scope

ENTRY: dict[str, Any] = {
    "id": "4f0c9a1e",
    "name": "ci",
    "sha256": "a" * 64,
    "scopes": ["publish"],
    "created_at": "2026-11-24T09:00:00Z",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def write(path: Path, *entries: Any, **more: Any) -> None:
    path.write_text(json.dumps({"keys": list(entries), **more}))


def refusal(path: Path) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read_keys(path)
    assert str(path) in caught.value.message
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, OSError)
    return caught.value


def test_what_is_added_is_read_again_in_order(path: Path) -> None:
    first, _ = add_key(path, "ci", [Scope.PUBLISH, Scope.GENERATE], ["team-a-*", "mood"])
    second, _ = add_key(path, "Ada’s laptop", [Scope.ADMIN], None)
    assert read_keys(path) == (first, second)
    assert first.tasks == ("team-a-*", "mood")
    assert "Ada’s laptop" in path.read_text()


def test_the_file_holds_no_key(path: Path) -> None:
    _, text = add_key(path, "ci", [Scope.PUBLISH], None)
    assert text.rpartition("_")[2] not in path.read_text()


def test_what_is_revoked_is_gone_and_the_others_stay(path: Path) -> None:
    made = [add_key(path, name, [Scope.PUBLISH], None)[0] for name in "abc"]
    assert revoke_key(path, made[1].id) == made[1]
    assert read_keys(path) == (made[0], made[2])


def test_the_last_key_can_be_revoked(path: Path) -> None:
    revoke_key(path, add_key(path, "ci", [Scope.PUBLISH], None)[0].id)
    assert read_keys(path) == ()


def test_a_key_that_is_not_there_cannot_be_revoked_and_is_not_repeated(path: Path) -> None:
    _, text = add_key(path, "ci", [Scope.PUBLISH], None)
    before = path.read_text()
    with pytest.raises(ConfigurationError, match="no key of that id") as caught:
        revoke_key(path, text)
    assert text not in str(caught.value)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_made_where_there_is_no_file_to_revoke_from(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        revoke_key(path, "4f0c9a1e")
    assert list(path.parent.iterdir()) == []


def test_only_the_owner_may_read_a_new_file_whatever_the_umask(path: Path) -> None:
    previous = os.umask(0)
    try:
        add_key(path, "ci", [Scope.PUBLISH], None)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("mode", "kept"), [(0o640, 0o640), (0o666, 0o644), (0o400, 0o600)])
def test_whoever_was_let_read_the_file_still_can_and_nobody_else_may_write_it(path: Path, mode: int, kept: int) -> None:
    key, _ = add_key(path, "ci", [Scope.PUBLISH], None)
    path.chmod(mode)
    revoke_key(path, key.id)
    assert stat.S_IMODE(path.stat().st_mode) == kept


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_root_leaves_the_file_to_its_owner(path: Path) -> None:
    key, _ = add_key(path, "ci", [Scope.PUBLISH], None)
    os.chown(path, 10001, 10002)
    revoke_key(path, key.id)
    assert (path.stat().st_uid, path.stat().st_gid) == (10001, 10002)


def test_a_link_to_the_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    key, _ = add_key(link, "ci", [Scope.PUBLISH], None)
    assert link.is_symlink()
    assert read_keys(path) == (key,)


def test_the_file_is_replaced_as_a_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = add_key(path, "ci", [Scope.PUBLISH], None)
    seen: list[tuple[ApiKey, ...]] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.extend((read_keys(path), read_keys(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    other, _ = add_key(path, "other", [Scope.PUBLISH], None)
    assert seen == [(key,), (key, other)]


def test_a_change_that_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = add_key(path, "ci", [Scope.PUBLISH], None)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="cannot be written: No space left on device"):
        add_key(path, "other", [Scope.PUBLISH], None)
    assert read_keys(path) == (key,)
    assert list(path.parent.iterdir()) == [path]


def test_two_changes_at_once_lose_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = add_key(path, "ci", [Scope.PUBLISH], None)
    refused: list[str] = []
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        def meanwhile() -> None:
            try:
                add_key(path, "meanwhile", [Scope.PUBLISH], None)
            except ConfigurationError as error:
                refused.append(error.message)

        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join(10)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    revoke_key(path, key.id)
    assert ["keys.json.new exists" in message for message in refused] == [True]
    assert read_keys(path) == ()
    monkeypatch.undo()
    add_key(path, "later", [Scope.PUBLISH], None)


@pytest.mark.parametrize("name", ["no/keys.json", "file/keys.json"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written") as caught:
        add_key(tmp_path / name, "ci", [Scope.PUBLISH], None)
    assert "may write to" in caught.value.remedy


def test_a_key_that_cannot_be_is_refused_before_anything_is_written(path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no such key: tasks 1: this is no task's name, .*, such as team-a-\*\. See"
    ):
        add_key(path, "ci", [Scope.PUBLISH], ["Not Fine"])
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ("{}", "keys: Field required"),
        ('{"keys": {}}', "keys: Input should be a valid"),
        (json.dumps({"keys": [ENTRY], "key": []}), "key: Extra inputs"),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "id": "other", "scope": []}]}), "key 2, scope: Extra inputs"),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "id": "other", "scopes": ["all"]}]}), "key 2, scopes 1: "),
        (json.dumps({"keys": [{**ENTRY, "sha256": "SECRET"}]}), "key 1, sha256: "),
        (json.dumps({"keys": [ENTRY, ENTRY]}), "two keys have the id 4f0c9a1e"),
        (json.dumps({"keys": [{**ENTRY, "scopes": ["admin"], "tasks": ["a"]}]}), "key 1: a key with the scope admin"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_entry_and_not_quoted(path: Path, content: str, problem: str) -> None:
    path.write_text(content)
    error = refusal(path)
    assert problem in error.message
    assert "SECRET" not in str(error)
    assert "restore the file" in error.remedy


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(b'{"keys": [{"id": "\xff"}]}')
    assert "does not fit" in refusal(path).message


def test_a_folder_that_cannot_be_synced_loses_no_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    key, _ = add_key(path, "ci", [Scope.PUBLISH], None)
    assert read_keys(path) == (key,)


def test_a_file_that_is_not_there_is_refused_with_the_command_that_makes_it(path: Path) -> None:
    error = refusal(path)
    assert "cannot be read: No such file or directory" in error.message
    assert f"prelude keys create --file {path} --name NAME" in error.remedy


def test_a_broken_file_is_not_replaced_by_a_new_one(path: Path) -> None:
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="does not fit"):
        add_key(path, "ci", [Scope.PUBLISH], None)
    assert path.read_text() == "{"
    assert list(path.parent.iterdir()) == [path]
