"""Data, references and meta.json: found by themselves, and refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.data_dir import resolve_data
from server.errors import InvalidRequest, InvalidTrainingData
from server.evaluation.data import read_evaluation_data
from tests.train.rows import MOODS, write_rows


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "test.jsonl", MOODS)
    return tmp_path


def test_without_references_the_target_is_the_only_one(folder: Path) -> None:
    data = read_evaluation_data(folder / "test.jsonl")
    assert data.references == (("yes",), ("yes",), ("no",), ("no",))
    assert (data.instruction, data.labels) == (None, None)


def test_references_and_instruction_are_found_beside_the_data(folder: Path) -> None:
    (folder / "test.references.jsonl").write_text(lines(*({"references": [str(i), "x"]} for i in range(4))))
    (folder / "meta.json").write_text(json.dumps({"instruction": "Good?"}))
    data = read_evaluation_data(folder / "test.jsonl", limit=2)
    assert data.references == (("0", "x"), ("1", "x"))
    assert data.instruction == "Good?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines({"references": ["a"]}), r"rows\.references\.jsonl has no line 2"),
        (lines(*[{"references": ["a"]}] * 5), r"test\.jsonl has no line 5"),
        ("{\n", r"rows\.references\.jsonl, line 1: not JSON"),
        (lines({"references": ["a"]}, {"references": []}), r"references\.jsonl, line 2: no list 'references'"),
        (lines({"references": "a"}), "line 1: no list 'references'"),
        (lines({"references": ["a"] * 101}), "line 1: 101 references"),
        (lines({"references": ["a" * 100_001]}), "line 1: 1 references of 100,001 characters"),
        ("\n" * 10_000, r"test\.jsonl has no line"),
        ("[" * 2**21, "line 1: longer than"),
    ],
)
def test_references_that_do_not_go_line_by_line_are_refused(folder: Path, text: str, message: str) -> None:
    (folder / "rows.references.jsonl").write_text(text)
    with pytest.raises(InvalidTrainingData, match=message):
        read_evaluation_data(folder / "test.jsonl", references=folder / "rows.references.jsonl")


def test_a_file_is_called_by_the_name_that_its_user_knows(folder: Path) -> None:
    (folder / "test.jsonl").write_text(lines({"input": "a", "target": "b"}, {"input": "a"}))
    with pytest.raises(InvalidTrainingData, match=r"^mine\.jsonl, line 2: no string field 'target'"):
        read_evaluation_data(folder / "test.jsonl", name="mine.jsonl")


def test_what_lies_beside_is_not_read_through_a_link_that_leads_out(folder: Path, tmp_path: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    write_rows(inside / "test.jsonl", MOODS)
    (folder / "secret.json").write_text(json.dumps({"instruction": "secret"}))
    (inside / "meta.json").symlink_to(folder / "secret.json")
    assert read_evaluation_data(inside / "test.jsonl", inside=inside).instruction is None
    assert read_evaluation_data(inside / "test.jsonl").instruction == "secret"


def test_a_name_inside_the_data_directory_is_found(folder: Path) -> None:
    (folder / "deep").mkdir()
    write_rows(folder / "deep/rows.jsonl", MOODS)
    (folder / "link.jsonl").symlink_to("deep/rows.jsonl")
    assert resolve_data("deep/rows.jsonl", folder) == (folder / "deep/rows.jsonl").resolve()
    assert resolve_data("link.jsonl", folder) == (folder / "deep/rows.jsonl").resolve()


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "a/../../secret", "/etc/passwd", "..", ".", "", "a/../test.jsonl", "C:\\secret", "..\\secret"),
        *("a\0b", "link", "linked/secret", "missing", "folder", "x" * 5000),
    ],
)
def test_no_name_leads_out_of_the_data_directory(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "linked").symlink_to(tmp_path)
    write_rows(root / "test.jsonl", MOODS)
    with pytest.raises(InvalidRequest) as refused:
        resolve_data(name, root)
    assert str(tmp_path) not in str(refused.value)


def test_without_a_data_directory_nothing_can_be_named() -> None:
    with pytest.raises(InvalidRequest, match="PRELUDE_DATA_DIR"):
        resolve_data("test.jsonl", None)


def test_references_are_read_no_further_than_the_rows_go(folder: Path) -> None:
    (folder / "rows.references.jsonl").write_text(lines({"references": ["a"]}) * 100_000)
    looked = 0

    def check_cancelled() -> None:
        nonlocal looked
        looked += 1

    with pytest.raises(InvalidTrainingData, match="has no line 5"):
        read_evaluation_data(
            folder / "test.jsonl", references=folder / "rows.references.jsonl", check_cancelled=check_cancelled
        )
    assert looked < 20
