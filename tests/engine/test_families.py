"""Every family of causal language models in transformers is served right or refused, as docs/models.md says."""

from __future__ import annotations

import warnings

import pytest
import transformers

from tests.engine.families import FAMILIES, TEXT, judge, judge_all, row, table, written_table
from tests.soak import Soak

OFTEN = [
    *(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "ministral3",
        "phi3",
        "gemma2",
        "gemma3_text",
        "gemma3",
        "smollm3",
        "olmo3",
    ),
    *("cohere2", "exaone4", "granite", "seed_oss", "apertus", "hunyuan_v1_dense", "ernie4_5", "glm4", "opt", "gpt2"),
    *("qwen3_moe", "mixtral", "olmoe", "minimax_m2", "granitemoe", "ernie4_5_moe", "phimoe", "flex_olmo", "glm4_moe"),
    *(
        "mistral3",
        "gpt_oss",
        "gemma3n_text",
        "gemma4_text",
        "llama4_text",
        "deepseek_v3",
        "bert",
        "roberta",
        "ctrl",
        "diffllama",
    ),
    *(
        "qwen3_next",
        "qwen3_5_text",
        "lfm2",
        "lfm2_moe",
        "lfm2_vl",
        "granitemoehybrid",
        "nemotron_h",
        "falcon_h1",
        "falcon",
        "bloom",
        "stablelm",
    ),
]
"""Families that people run, and of each kind of refusal some."""


@pytest.mark.parametrize("family", OFTEN)
def test_a_family_is_served_right_or_refused_as_the_table_says(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = judge(family)
    assert verdict.status in ("right", "refused"), verdict
    assert row(verdict) in written_table().splitlines() or not is_of_this_version()


def is_of_this_version() -> bool:
    """Another version of transformers may have other families and say other things."""
    return f"transformers {transformers.__version__}:" in written_table().splitlines()[0]


@pytest.mark.skipif(not is_of_this_version(), reason="the table is of another version of transformers")
def test_the_table_names_every_family_and_no_wrong_one() -> None:
    rows = [line.split(" | ") for line in written_table().splitlines() if line.startswith("| `")][1:]
    assert [row[0] for row in rows] == [f"| `{family}`" for family in FAMILIES]
    assert {row[2] for row in rows} == {"yes", "no", "not built"}
    assert sum(row[2] == "not built" and row[0].strip("| `") in TEXT for row in rows) <= 5


@pytest.mark.soak
def test_every_family_is_served_right_or_refused_as_the_table_says(soak: Soak) -> None:
    """A whole sweep takes some minutes, so the short form looks at two families."""
    number = len(FAMILIES) if soak.full else 2
    names = FAMILIES if soak.full else ["mixtral", "gemma3n"]
    judged = judge_all(names)
    verdicts = [next(judged) for _ in soak.rounds(short=number, full=number, desc="families")]
    assert [verdict for verdict in verdicts if verdict.status == "wrong"] == []
    if soak.full and is_of_this_version():
        assert table(verdicts) == written_table()
