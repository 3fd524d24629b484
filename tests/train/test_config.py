"""What contradicts itself is found before any file is read, and named by its field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.train.config import TrainingConfig, contradiction

TEMPLATE = "{input}\n"


@pytest.mark.parametrize(
    ("fields", "template", "field"),
    [
        ({}, "no field", "input_template"),
        ({}, "{input} and {input}", "input_template"),
        ({"teacher_template": "no field"}, TEMPLATE, "config.teacher_template"),
        ({"labels": ("yes", "no")}, TEMPLATE, "config.labels"),
        ({"teacher_template": "{input}", "labels": ("yes",)}, TEMPLATE, "config.labels"),
        ({"teacher_template": "{input}", "labels": ("yes", "yes")}, TEMPLATE, "config.labels"),
        ({"teacher_template": "{input}", "labels": ("yes", " ")}, TEMPLATE, "config.labels"),
        ({"init": "teacher", "method": "prefix_tuning"}, TEMPLATE, "config.init"),
        ({"init": "teacher", "teacher_template": "{input}"}, TEMPLATE, "config.init"),
        ({"teacher_chat": True}, TEMPLATE, "config.teacher_chat"),
        ({"init": "random", "method": "prefix_tuning"}, TEMPLATE, "config.init"),
        ({"init_text": "classify"}, TEMPLATE, "config.init_text"),
        ({"init": "text", "init_text": " "}, TEMPLATE, "config.init_text"),
        ({"init": "text"}, TEMPLATE, "config.init_text"),
        ({"init": "text", "init_text": ""}, TEMPLATE, "config.init_text"),
        ({"init": "soft_prompt"}, TEMPLATE, "config.init_from"),
        ({"init_from": "mood"}, TEMPLATE, "config.init_from"),
    ],
)
def test_a_contradiction_names_its_field_and_a_remedy(fields: dict[str, Any], template: str, field: str) -> None:
    found = contradiction(replace(TrainingConfig(), **fields), template)
    assert found is not None
    assert found.field == field
    assert found.message.endswith(".")
    assert found.remedy.endswith(".")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"teacher_template": "Good? {input}", "labels": ("yes", "no")},
        {"init": "text", "init_text": "a"},
        {"init": "soft_prompt", "init_from": "mood"},
    ],
)
def test_what_fits_together_is_no_contradiction(fields: dict[str, Any]) -> None:
    assert contradiction(replace(TrainingConfig(), **fields), TEMPLATE) is None
