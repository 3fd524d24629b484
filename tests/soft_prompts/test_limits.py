"""How much a manifest may hold: what lists show, memory keeps and requests use is bounded when it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.limits import (
    MAX_DESCRIPTION,
    MAX_ENTRIES,
    MAX_LABEL_BYTES,
    MAX_LABELS,
    MAX_MANIFEST_BYTES,
    MAX_METRICS_BYTES,
    MAX_ROWS_BYTES,
    check_manifest,
    num_entries,
)
from server.soft_prompts.manifest import Manifest
from tests.peft_files import MANIFEST, peft_directory

TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "bytes": ({"training": {"note": "x" * MAX_MANIFEST_BYTES}}, "bytes"),
    "an unknown field": ({"of_tomorrow": "x" * MAX_MANIFEST_BYTES}, "bytes"),
    "fields": ({"training": {str(i): 1 for i in range(MAX_ENTRIES)}}, "fields and items"),
    "items": ({"training": {"a": [[1, 2]] * (MAX_ENTRIES // 3)}}, "fields and items"),
    "a description": ({"description": "ö" * (MAX_DESCRIPTION + 1)}, "characters of description"),
    "metrics": ({"metrics": {"table": "x" * MAX_METRICS_BYTES}}, "bytes of metrics"),
    "labels": ({"labels": [str(i) for i in range(MAX_LABELS + 1)]}, "501 labels; at most 500"),
    "long labels": ({"labels": [str(i) + "é" * (MAX_LABEL_BYTES // 200) for i in range(100)]}, "bytes of labels"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_manifest_that_holds_too_much_is_refused_with_figures(name: str, tmp_path: Path, spec: ModelSpec) -> None:
    fields, words = TOO_MUCH[name]
    (peft_directory(tmp_path) / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(InvalidSoftPrompt, match="at most") as caught:
        load_soft_prompts(tmp_path, spec, 16)
    assert words in caught.value.message


def test_a_label_named_twice_is_refused_at_upload_and_still_read_from_a_store(tmp_path: Path, spec: ModelSpec) -> None:
    text = json.dumps({"labels": ["ham", "spam", "ham"]})
    (peft_directory(tmp_path) / MANIFEST).write_text(text)
    with pytest.raises(InvalidSoftPrompt, match="names the label 'ham' more than once"):
        load_soft_prompts(tmp_path, spec, 16)
    assert Manifest.parse(text).labels == ("ham", "spam", "ham")


def test_a_manifest_within_every_bound_is_taken() -> None:
    check_manifest(
        Manifest(
            description="ö" * MAX_DESCRIPTION,
            labels=tuple(f"{i:03d}" + "x" * 20 for i in range(MAX_LABELS)),
            metrics={"table": "x" * (MAX_METRICS_BYTES - 20)},
            training={"note": "x" * (MAX_MANIFEST_BYTES // 2)},
        )
    )


def test_rows_times_what_each_keeps_is_bounded() -> None:
    manifest = Manifest(input_template="x" * 10_000 + "{input}", training={"note": "x" * 50_000})
    rows = MAX_ROWS_BYTES // 10_500
    check_manifest(manifest, rows)
    with pytest.raises(InvalidSoftPrompt, match="to keep for 420 tasks"):
        check_manifest(manifest, 420)


def test_entries_are_counted_at_every_depth() -> None:
    assert num_entries({"a": [1, {"b": 2}], "c": {}}) == 5
    assert num_entries("text") == 0
