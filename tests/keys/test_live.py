from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.errors import ConfigurationError
from server.keys import live
from server.keys.file import MAX_BYTES, add_key, revoke_key
from server.keys.key import Scope
from server.keys.live import ApiKeys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def text(path: Path) -> str:
    """A key that is in the file."""
    return add_key(path, "ci", [Scope.PUBLISH], None)[1]


@pytest.fixture
def _looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.0)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_key_is_found_by_its_text_and_nothing_else_is(path: Path, text: str) -> None:
    keys = ApiKeys(path)
    found = keys.find(text)
    assert found is not None
    assert (found.name, found.id) == ("ci", text.split("_")[1])
    other = add_key(path.with_name("other.json"), "other", [Scope.ADMIN], None)[1]
    mixed = "_".join([*text.split("_")[:2], other.split("_")[2]])
    for wrong in ("", "x", other, mixed, text + "0", text[:-1], f" {text}", found.sha256):
        assert keys.find(wrong) is None


@pytest.mark.usefixtures("_looks_always")
def test_a_revoked_key_stops_working_and_a_new_one_works_without_a_restart(path: Path, text: str) -> None:
    keys = ApiKeys(path)
    other = add_key(path, "other", [Scope.ADMIN], None)[1]
    assert keys.find(other) is not None
    revoke_key(path, text.split("_")[1])
    assert keys.find(text) is None
    assert keys.find(other) is not None


@pytest.mark.usefixtures("_looks_always")
def test_the_last_key_stops_working_too(path: Path, text: str) -> None:
    keys = ApiKeys(path)
    revoke_key(path, text.split("_")[1])
    assert keys.find(text) is None


def test_a_change_is_seen_after_a_second_and_the_file_is_not_looked_at_more_often(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    looks: list[float] = []
    stamp = live._stamp

    def counted(path: Path) -> live.Stamp | None:
        looks.append(now)
        return stamp(path)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(live, "_stamp", counted)
    keys = ApiKeys(path)
    revoke_key(path, text.split("_")[1])
    for now in (100.1, 100.5, 100.99):  # noqa: B007
        assert keys.find(text) is not None
    for now in (101.0, 101.5, 101.9):  # noqa: B007
        assert keys.find(text) is None
    assert looks == [100.0, 101.0]


@pytest.mark.usefixtures("_looks_always")
def test_a_file_written_in_place_is_followed_even_if_it_keeps_its_size_and_time(path: Path, text: str) -> None:
    keys = ApiKeys(path)
    before = path.stat()
    content = path.read_text()
    path.write_text(content.replace(text.split("_")[1], "00000000"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert keys.find(text) is None


@pytest.mark.parametrize("field", ["st_mtime_ns", "st_ctime_ns", "st_size", "st_ino"])
def test_a_file_that_differs_in_one_thing_alone_is_another(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Two files that are written within one tick of the clock differ in the inode alone."""
    state = path.stat()
    names = ("st_mtime_ns", "st_ctime_ns", "st_size", "st_ino")
    fake = SimpleNamespace(**{name: getattr(state, name) + (name == field) for name in names})
    before = live._stamp(path)
    monkeypatch.setattr(Path, "stat", lambda self: fake)
    assert live._stamp(path) != before


@pytest.mark.usefixtures("_looks_always")
@pytest.mark.parametrize("broken", ['{"keys": [{"secret": "HIDDEN"}]}', "HIDDEN", None])
def test_a_file_that_breaks_or_vanishes_keeps_the_last_good_keys_and_says_so_once(
    path: Path, text: str, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    keys = ApiKeys(path)
    good = path.read_bytes()
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for _ in range(5):
        assert keys.find(text) is not None
    assert len(errors(caplog)) == 1
    assert errors(caplog)[0].endswith("The keys that were read before stay valid.")
    assert "HIDDEN" not in caplog.text
    path.write_bytes(good)
    revoke_key(path, text.split("_")[1])
    assert keys.find(text) is None
    assert len(errors(caplog)) == 1


@pytest.mark.usefixtures("_looks_always")
def test_a_server_does_not_start_without_any_key(path: Path, text: str) -> None:
    revoke_key(path, text.split("_")[1])
    with pytest.raises(ConfigurationError, match="holds no key") as caught:
        ApiKeys(path)
    assert "prelude keys create" in caught.value.remedy
    path.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        ApiKeys(path)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o644, 0), (0o620, 1), (0o602, 1)])
def test_a_file_that_others_may_write_is_warned_of(
    path: Path, text: str, caplog: pytest.LogCaptureFixture, mode: int, warned: int
) -> None:
    path.chmod(mode)
    ApiKeys(path)
    assert caplog.text.count("can be written by others") == warned
    assert text not in caplog.text


@pytest.mark.usefixtures("_looks_always")
def test_a_change_is_logged_without_its_content(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = ApiKeys(path)
    key, other = add_key(path, "other", [Scope.ADMIN], None)
    keys.find(other)
    assert "now holds 2 keys" in caplog.text
    for hidden in (text, other, key.sha256):
        assert hidden not in caplog.text


@pytest.mark.usefixtures("_looks_always")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_of_keys_in_its_place_leaves_the_keys_valid(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(path)
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # opening a pipe blocks until it has a writer
    assert keys.find(text) is not None
    assert "not a regular file" in errors(caplog)[-1]
    path.unlink()
    path.write_bytes(bytes(MAX_BYTES + 1))
    assert keys.find(text) is not None
    assert "at most 4,194,304" in errors(caplog)[-1]
    path.write_bytes(content)
    revoke_key(path, text.split("_")[1])
    assert keys.find(text) is None


@pytest.mark.usefixtures("_looks_always")
def test_a_file_system_that_hangs_holds_up_nobody_and_is_followed_again_afterwards(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(path)
    looks, answers = [], threading.Event()
    stamp_of = live._stamp

    def hangs(path: Path) -> live.Stamp | None:
        looks.append(path)
        answers.wait(10)
        return stamp_of(path)

    monkeypatch.setattr(live, "_stamp", hangs)
    revoke_key(path, text.split("_")[1])
    began = time.monotonic()
    for _ in range(100):
        assert keys.find(text) is not None
    assert time.monotonic() - began < 5
    assert len(looks) == 1
    assert [error for error in errors(caplog) if "does not answer" in error]
    answers.set()
    end = time.monotonic() + 5
    while keys.find(text) is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
