"""Names of tasks, and how a request writes them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import pytest

from server.errors import InvalidTaskName
from server.soft_prompts.names import MANY, check_task_name, nearby, split_version, unknown_task

BAD = ["", "A", "-a", ".a", "_a", "a" * 65, "a b", "a/b", "../a", "a\n", "ä", "a@1", "a\0", "٣", "a" * 10_000]


@pytest.mark.parametrize("name", ["a", "0", "sms_spam", "a.b-c_d", "a" * 64, "a..b"])
def test_a_good_name_is_taken_as_it_is(name: str) -> None:
    assert check_task_name(name) == name
    assert split_version(name) == (name, None)
    assert split_version(f"{name}@12") == (name, 12)


@pytest.mark.parametrize("name", BAD)
def test_any_other_name_is_refused_with_the_pattern_and_never_repeated_at_length(name: str) -> None:
    with pytest.raises(InvalidTaskName) as caught:
        check_task_name(name)
    assert "[a-z0-9][a-z0-9._-]{0,63}" in caught.value.remedy
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("version", ["", "0", "01", "-1", "1.5", "x", "1@2", "9" * 10, "٣", " 1"])
def test_a_version_is_a_positive_number(version: str) -> None:
    with pytest.raises(InvalidTaskName, match="task@3"):
        split_version(f"task@{version}")


@pytest.mark.parametrize("reference", ["@1", "A@1", "@"])
def test_a_version_needs_the_name_of_a_task(reference: str) -> None:
    with pytest.raises(InvalidTaskName):
        split_version(reference)


def test_ten_thousand_names_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"customer-{number:05d}-sentiment" for number in range(10_000)]
    compared: list[int] = []
    really = difflib.get_close_matches

    def count(word: str, possibilities: Sequence[str], n: int) -> list[str]:
        compared.append(len(possibilities))
        return really(word, possibilities, n)

    monkeypatch.setattr(difflib, "get_close_matches", count)
    for misspelt in ("customer-00012-sentimnt", "custmer-00012-sentiment", "kustomer-00012-sentiment"):
        assert "customer-00012-sentiment" in unknown_task(misspelt, names).message, misspelt
    assert max(compared) < 300, "it is the event loop that would wait"


def test_among_many_names_only_the_neighbours_of_a_misspelt_one_are_compared() -> None:
    few = [f"task-{number:07}" for number in range(MANY)]
    assert nearby("task-00000012", few) == few
    many = [*few, "zebra"]
    near = nearby("task-00001234", many)
    assert len(near) <= 100
    assert "task-0000123" in near
    assert "task-0000123?" in unknown_task("task-00001234", near).message
    assert "zebra" in nearby("zebraa", many)


def test_an_unknown_task_names_near_ones_and_only_those() -> None:
    assert "Did you mean sms_spam?" in unknown_task("sms-spam", ["emotion", "sms_spam"]).message
    assert "Did you mean" not in unknown_task("xyz", ["emotion", "sms_spam"]).message
    assert unknown_task("xyz", []).status == 404
