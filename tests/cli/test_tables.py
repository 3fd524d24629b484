from __future__ import annotations

import io
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from server.cli.diff import Comparison, FieldChange, RowChange, TensorChange
from server.cli.tables import UNLIMITED, live_sentence, print_comparison, print_tasks, print_versions
from server.client import PromptEntry, Version, VersionList

LONG = "Says of a text message in English whether it is spam, and is described at a length that no terminal has."
TASKS: list[PromptEntry] = [
    {"task": "broken", "error": "adapter_model.safetensors is missing."},
    {"task": "canary", "version": 3, "traffic": {"3": 90, "10": 10}, "peft_type": "P_TUNING", "num_virtual_tokens": 20},
    {"task": "sms_spam", "version": 12, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 100, "description": LONG},
    {"task": "staged"},
]


def shown(print_to: Callable[[Console], None], width: int | None) -> str:
    """What a terminal of a width shows, or (None) what a pipe gets."""
    file = io.StringIO()
    is_terminal = width is not None
    color = "standard" if is_terminal else None
    print_to(
        Console(
            file=file,
            width=width or UNLIMITED,
            force_terminal=is_terminal,
            color_system=color,  # type: ignore[arg-type]
            highlight=False,
            _environ={},
        )
    )
    return file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def version(number: int, **fields: Any) -> Version:
    defaults: dict[str, Any] = {
        "version": number,
        "live": False,
        "digest": "d" * 64,
        "prefix_hash": "p" * 64,
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 20,
        "bytes": 46080,
        "created_at": "2026-01-02T03:04:05+00:00",
        "source": "api",
    }
    made: Version = defaults | fields  # type: ignore[assignment]
    return made


def test_a_pipe_gets_whole_lines_without_colours_or_blanks_at_their_ends() -> None:
    text = shown(lambda out: print_tasks(TASKS, out), None)
    assert "\x1b" not in text
    assert len(text.splitlines()) == 1 + len(TASKS)
    assert LONG in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert re.split(r"\s{2,}", text.splitlines()[1]) == [
        "broken",
        *"–––",
        "error: adapter_model.safetensors is missing.",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_lines_that_fit_and_hold_everything(width: int) -> None:
    text = plain(shown(lambda out: print_tasks(TASKS, out), width))
    assert all(len(line) <= width for line in text.splitlines())
    for word in [*LONG.split(), "prompt_tuning", "100", "canary", "3 (90 %),", "missing."]:
        assert word in text


def test_what_is_broken_is_red_and_says_why() -> None:
    text = shown(lambda out: print_tasks(TASKS, out), 120)
    assert "\x1b[31merror: adapter_model.safetensors is missing." in text


def test_a_canary_shows_its_weights_and_a_task_without_a_live_version_says_so() -> None:
    lines = shown(lambda out: print_tasks(TASKS, out), None).splitlines()
    assert lines[2].startswith("canary    3 (90 %), 10 (10 %)  p_tuning ")
    assert lines[4].endswith("no version is live")


def test_no_task_at_all_is_a_sentence() -> None:
    assert shown(lambda out: print_tasks([], out), None).startswith("No tasks yet")


@pytest.mark.parametrize("width", [80, None])
def test_what_a_server_says_is_neither_markup_nor_an_escape_sequence(width: int | None) -> None:
    text = "[red]a[/red] \x1b[2Jb\r\nc\x9b1m\u202e[/nothing]"
    entry: PromptEntry = {"task": "x", "version": 1, "description": text}
    result = shown(lambda out: print_tasks([entry], out), width)
    assert "[red]a[/red]" in result
    assert not {"\x1b[2J", "\r", "\x9b", "\u202e"} & set(re.findall(r"\x1b\[2J|[\r\x9b\u202e]", result))
    assert len(result.splitlines()) == 2


def test_versions_tell_live_weight_age_who_size_and_metrics() -> None:
    now = datetime.now(UTC)
    listed: VersionList = {
        "task": "x",
        "live": 3,
        "traffic": {"3": 90, "2": 10},
        "etag": "42",
        "versions": [
            version(
                3,
                live=True,
                created_at=now.isoformat(),
                by="alice",
                metrics={"loss": 0.123456789, "loss_interval": [0.1, 0.2], "rows": 4},
            ),
            version(2, live=True, created_at=(now - timedelta(minutes=61)).isoformat(), bytes=512),
            version(1, created_at=(now - timedelta(days=3)).isoformat(), source="inbox", bytes=3 * 2**20),
        ],
    }
    lines = shown(lambda out: print_versions(listed, out), None).splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in lines] == [
        ["version", "live", "when", "who", "size", "metrics"],
        ["3", "90 %", "just now", "alice", "45.0 KiB", "loss 0.1235, rows 4"],
        ["2", "10 %", "1 hour ago", "api", "512 B"],
        ["1", "3 days ago", "inbox", "3.0 MiB"],
    ]
    assert "state 42, for --if-match" in shown(lambda out: print_versions(listed, out), 80)


def test_one_live_version_is_marked() -> None:
    listed: VersionList = {"task": "x", "live": 1, "versions": [version(2), version(1, live=True)]}
    lines = shown(lambda out: print_versions(listed, out), None).splitlines()
    assert ["live" in line for line in lines] == [True, False, True]


def test_a_time_that_cannot_be_read_is_shown_as_it_is() -> None:
    listed: VersionList = {"task": "x", "versions": [version(1, created_at="yesterday")]}
    assert "yesterday" in shown(lambda out: print_versions(listed, out), None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"live": 3}, "x: version 3 is live"),
        ({"live": None}, "x: no version is live"),
        ({}, "x: no version is live"),
        ({"live": 3, "traffic": {"10": 5, "3": 95}}, "x: versions 3 (95 %), 10 (5 %) are live"),
    ],
)
def test_what_is_live_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    listed: VersionList = {"task": "x", "versions": [], **fields}  # type: ignore[typeddict-item]
    assert live_sentence(listed) == sentence


COMPARISON = Comparison(
    a="sms_spam@2",
    b="./new",
    manifest=(FieldChange("digest", "a" * 64, None), FieldChange("input_template", "{input}\n", "{input}\n\nLabel:")),
    config=(FieldChange("inference_mode", None, True),),
    tensors=(
        TensorChange(
            "prompt_embeddings", "F32", "BF16", (1, 8), (2, 8), False, 0.25, (RowChange(0, 0.5, 1.5, None, 0.25),)
        ),
    ),
)


def test_a_comparison_is_side_by_side() -> None:
    text = shown(lambda out: print_comparison(COMPARISON, out), None)
    assert [re.split(r"\s{2,}", line) for line in text.splitlines()] == [
        ["manifest.json", "sms_spam@2", "./new"],
        ["digest", "aaaaaaaaaaaa…", "–"],
        ["input_template", r"{input}\n", r"{input}\n\nLabel:"],
        [""],
        ["adapter_config.json", "sms_spam@2", "./new"],
        ["inference_mode", "–", "true"],
        [""],
        ["adapter_model.safetensors", "sms_spam@2", "./new", "identical", "max |a-b|"],
        ["prompt_embeddings", "F32 [1, 8]", "BF16 [2, 8]", "no", "0.25"],
        [""],
        ["virtual token", "cosine", "norm a", "norm b", "max |a-b|"],
        ["", "0", "0.5000", "1.5", "–", "0.25"],
    ]
    assert all(len(line) <= 80 for line in plain(shown(lambda out: print_comparison(COMPARISON, out), 80)).splitlines())
