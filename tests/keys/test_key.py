from __future__ import annotations

import hashlib
import hmac
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.keys.key import NO_HASH, ApiKey, Scope, is_secret_of, make_key, matches, split_key

FIELDS: dict[str, Any] = {
    "id": "4f0c9a1e",
    "name": "ci",
    "sha256": "a" * 64,
    "scopes": ["publish"],
    "created_at": "2026-11-24T09:00:00Z",
}


def key(**fields: Any) -> ApiKey:
    return ApiKey.model_validate({**FIELDS, **fields})


def test_a_new_key_is_known_by_its_hash_alone_and_has_256_random_bits() -> None:
    made, text = make_key("ci", [Scope.PUBLISH], None)
    key_id, secret = split_key(text)
    assert (key_id, made.sha256) == (made.id, hashlib.sha256(secret.encode()).hexdigest())
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert secret not in made.model_dump_json()
    assert made.sha256 not in repr(made)
    assert len({make_key("ci", [Scope.PUBLISH], None)[1] for _ in range(50)}) == 50


def test_only_its_own_secret_opens_a_key() -> None:
    made, text = make_key("ci", [Scope.PUBLISH], None)
    secret = split_key(text)[1]
    assert is_secret_of(made, secret)
    assert not is_secret_of(made, secret[:-1] + ("0" if secret[-1] != "0" else "1"))
    assert not is_secret_of(made, "")
    assert not is_secret_of(None, secret)
    assert not is_secret_of(None, "")


def test_hashes_are_compared_in_constant_time_also_for_a_key_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []
    original = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    hashed = hashlib.sha256(b"secret").hexdigest()
    is_secret_of(key(), "secret")
    is_secret_of(None, "secret")
    assert compared == [(hashed, "a" * 64), (hashed, NO_HASH)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prelude_4f0c9a1e",
        "prelude_4f0c9a1e_" + "a" * 63,
        "prelude_4f0c9a1e_" + "a" * 65,
        "prelude_4f0c9a1e_" + "A" * 64,
        "prelude__" + "a" * 64,
        "Prelude_4f0c9a1e_" + "a" * 64,
        "prelude_4f0c9a1e_" + "a" * 64 + "\n",
        "prelude_4f0c9a1e_" + "٣" * 64,
        "hf_" + "a" * 64,
    ],
)
def test_what_has_not_the_form_of_a_key_is_none(text: str) -> None:
    assert split_key(text) == ("", "")


def test_admin_is_every_scope_and_the_others_are_only_themselves() -> None:
    assert [key(scopes=["admin"]).may(scope) for scope in Scope] == [True] * len(Scope)
    assert [key(scopes=["publish"]).may(scope) for scope in Scope] == [False, True, False, False]
    assert [key(scopes=["generate"]).may(scope) for scope in Scope] == [True, False, False, False]


def test_without_patterns_a_key_is_for_every_task_and_with_them_for_those_that_one_covers() -> None:
    assert key().is_for("anything")
    limited = key(tasks=["team-a-*", "mood"])
    assert [limited.is_for(task) for task in ("team-a-x", "mood", "mood-0", "team-b-x")] == [True, True, False, False]


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "a_b0"},
        {"id": "abc"},
        {"id": "ABCD"},
        {"name": ""},
        {"name": "two\nlines"},
        {"name": "\x1b[31mred"},
        {"sha256": "a" * 63},
        {"sha256": "A" * 64},
        {"scopes": []},
        {"scopes": ["everything"]},
        {"scopes": ["publish", "publish"]},
        {"tasks": []},
        {"tasks": ["Team-*"]},
        {"tasks": ["team a"]},
        {"tasks": ["team-?"]},
        {"tasks": ["team-[ab]"]},
        {"tasks": [""]},
        {"tasks": ["a", "a"]},
        {"tasks": ["a\n"]},
        {"scopes": ["admin"], "tasks": ["team-*"]},
        {"created_at": "2026-11-24T09:00:00"},
        {"expires": "never"},
    ],
    ids=str,
)
def test_a_key_that_does_not_fit_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        key(**fields)


def covers(pattern: str, name: str) -> bool:
    """What `*` means, one character after the other."""
    if not pattern or not name:
        return set(pattern) <= {"*"} and not name
    if pattern[0] == "*":
        return covers(pattern[1:], name) or covers(pattern, name[1:])
    return pattern[0] == name[0] and covers(pattern[1:], name[1:])


NAMES = st.text("ab.-", max_size=8)
PATTERNS = st.text("ab.-*", max_size=8)


@given(PATTERNS, NAMES)
@example("a*a", "a")
@example("a*b*", "ab")
@example("*b*b", "b")
@example("*ab*ab*", "abab")
@example("*ab*ab*", "aba")
@example("", "")
def test_a_star_stands_for_any_characters_and_nothing_else_is_special(pattern: str, name: str) -> None:
    assert matches(pattern, name) == covers(pattern, name)


def test_many_stars_take_no_longer_than_few() -> None:
    started = time.perf_counter()
    for _ in range(100):
        assert not matches("*a" * 31 + "b", "a" * 63)
    assert time.perf_counter() - started < 0.5
