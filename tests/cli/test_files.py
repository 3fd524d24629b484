from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from server.cli import files
from server.cli.files import check_target, find_upload, new_directory, unpack
from server.errors import ConfigurationError, InvalidSoftPrompt, InvalidTaskName
from server.soft_prompts import declared, formats
from tests.api.live import Files, zip_of

CONTENT: Files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"numbers", "manifest.json": b"{}"}


def write(directory: Path, content: Files = CONTENT) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory


def without(name: str) -> Files:
    return {key: data for key, data in CONTENT.items() if key != name}


def read(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_files_are_those_that_the_server_reads_and_writes() -> None:
    assert files.FILES == (declared.CONFIG_FILE, formats.TENSOR_FILE, formats.MANIFEST_FILE)
    assert files.PICKLE_FILE in formats.PICKLE_FILES


def test_of_a_directory_only_the_files_of_a_soft_prompt_are_sent(tmp_path: Path) -> None:
    directory = write(tmp_path / "task", CONTENT | {"README.md": b"x", "optimizer.pt": b"x", "adapter_model.bin": b"x"})
    upload = find_upload(str(directory))
    assert [file.name for file in upload.files] == list(files.FILES)
    assert upload.num_bytes == sum(map(len, CONTENT.values()))


def test_a_manifest_is_not_needed(tmp_path: Path) -> None:
    upload = find_upload(str(write(tmp_path / "task", without("manifest.json"))))
    assert [file.name for file in upload.files] == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_zip_is_sent_as_it_is(tmp_path: Path) -> None:
    archive = tmp_path / "My_Task.ZIP"
    archive.write_bytes(zip_of(CONTENT))
    upload = find_upload(str(archive))
    assert (upload.files, upload.task(None)) == ((archive,), "my_task")


def test_a_local_path_wins_over_a_repository_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "name")
    assert find_upload("org/name").task(None) == "name"
    assert find_upload("./org/name/").task(None) == "name"
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert find_upload(".").task(None) == "name"


def test_the_name_given_wins_over_that_of_the_directory(tmp_path: Path) -> None:
    upload = find_upload(str(write(tmp_path / "Checkpoint-100")))
    assert upload.task(None) == "checkpoint-100"
    assert upload.task("mood") == "mood"
    with pytest.raises(InvalidTaskName):
        upload.task("Mood")


def test_a_directory_whose_name_no_task_can_have_needs_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskName, match="'my task' cannot be the name") as caught:
        find_upload(str(write(tmp_path / "my task"))).task(None)
    assert caught.value.remedy == "Name one with --task."


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "holds no adapter_config.json"),
        (without("adapter_config.json"), "holds no adapter_config.json"),
        (without("adapter_model.safetensors"), "holds no adapter_model.safetensors"),
        (without("adapter_model.safetensors") | {"adapter_model.bin": b"x"}, "holds only adapter_model.bin, a pickle"),
    ],
)
def test_a_directory_that_is_no_soft_prompt_is_told_apart(tmp_path: Path, content: Files, told: str) -> None:
    with pytest.raises(InvalidSoftPrompt, match=told):
        find_upload(str(write(tmp_path / "task", content)))


def test_a_pickle_is_told_how_to_convert(tmp_path: Path) -> None:
    with pytest.raises(InvalidSoftPrompt) as caught:
        find_upload(str(write(tmp_path / "task", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})))
    assert "safe_serialization=True" in caught.value.remedy


def test_a_file_that_is_no_zip_is_refused_with_its_directory_as_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidSoftPrompt, match=r"neither a directory nor a \.zip") as caught:
        find_upload(str(write(tmp_path / "task") / "adapter_model.safetensors"))
    assert "Name the directory" in caught.value.remedy


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    directory = write(tmp_path / "task", without("manifest.json"))
    os.mkfifo(directory / "manifest.json")
    with pytest.raises(InvalidSoftPrompt, match=r"manifest\.json cannot be read"):
        find_upload(str(directory))


@pytest.mark.parametrize("source", ["nothing", "./org/name", "a/b/c", "org/name.zip", "/org/name", "x" * 300, "../x"])
def test_what_is_neither_here_nor_the_name_of_a_repository_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidSoftPrompt) as caught:
        find_upload(source)
    assert source in caught.value.message
    assert "hub" not in caught.value.message


def test_only_the_files_of_a_soft_prompt_are_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "some.zip"
    archive.write_bytes(zip_of(CONTENT | {"../evil": b"x", "/evil": b"x", "sub/manifest.json": b"x", "x.py": b"x"}))
    (tmp_path / "out").mkdir()
    unpack(archive, tmp_path / "out")
    assert read(tmp_path / "out") == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "some.zip"]


@pytest.mark.parametrize("damage", [b"", b"not a zip", zip_of(CONTENT)[:-30], zip_of(without("adapter_config.json"))])
def test_a_damaged_download_is_told_as_such(tmp_path: Path, damage: bytes) -> None:
    archive = tmp_path / "some.zip"
    archive.write_bytes(damage)
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidSoftPrompt, match="The download"):
        unpack(archive, tmp_path / "out")


def test_a_download_that_would_fill_the_disk_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "some.zip"
    archive.write_bytes(zip_of(CONTENT))
    monkeypatch.setattr(files, "MAX_PULLED_BYTES", 10)
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidSoftPrompt, match="larger than any soft prompt"):
        unpack(archive, tmp_path / "out")
    assert read(tmp_path / "out") == {}


def test_a_new_directory_appears_whole_and_readable_for_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "task"
    with new_directory(target) as filled:
        write(filled)
        assert not target.exists()
    assert read(target) == CONTENT
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(tmp_path.joinpath("deep").stat().st_mode)
    assert [path.name for path in target.parent.iterdir()] == ["task"]


def test_a_directory_that_could_not_be_filled_does_not_appear(tmp_path: Path) -> None:
    def fill() -> None:
        with new_directory(tmp_path / "task") as filled:
            write(filled)
            raise InvalidSoftPrompt("damaged")

    with pytest.raises(InvalidSoftPrompt, match="damaged"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_keeps_what_is_not_part_of_a_soft_prompt(tmp_path: Path) -> None:
    target = write(tmp_path / "task", CONTENT | {"README.md": b"mine"})
    new = {"adapter_config.json": b"{1}", "adapter_model.safetensors": b"other"}
    with new_directory(target) as filled:
        write(filled, new)
    assert read(target) == new | {"README.md": b"mine"}


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"), new_directory(tmp_path / "file" / "task"):
        pass


def test_what_is_there_is_overwritten_only_when_forced(tmp_path: Path) -> None:
    check_target(tmp_path / "none", force=False)
    check_target(tmp_path, force=False)
    target = write(tmp_path / "task")
    with pytest.raises(ConfigurationError, match="is not empty") as caught:
        check_target(target, force=False)
    assert "--force" in caught.value.remedy
    check_target(target, force=True)
    with pytest.raises(ConfigurationError, match="is not a directory"):
        check_target(target / "manifest.json", force=True)
