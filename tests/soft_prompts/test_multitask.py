from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt
from server.soft_prompts.formats import load_soft_prompts
from tests.peft_files import (
    CONFIG,
    TENSORS,
    edit_json,
    edit_tensors,
    peft_directory,
    write_safetensors,
)
from tests.soft_prompts.files import refusal


@pytest.mark.parametrize(
    ("cols", "rows"),
    [
        (None, (3, 2, 32)),
        ((3, 5, 2), None),
        ((3, 4, 2), (3, 2, 32)),
        ((3, 5, 2), (2, 2, 32)),
        ((3, 5, 2), (3, 3, 32)),
        ((3, 5, 2), (3, 2, 16)),
        ((0, 5, 2), (0, 2, 32)),
        ((3, 5, 0), (3, 0, 32)),
        ((1001, 5, 1), (1001, 1, 32)),
        ((5, 2), (2, 32)),
    ],
)
def test_multitask_tensors_that_do_not_fit_each_other_are_refused(
    cols: tuple[int, ...] | None, rows: tuple[int, ...] | None, tmp_path: Path, spec: ModelSpec
) -> None:
    edit_tensors(
        peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING"),
        prefix_task_cols=None if cols is None else torch.ones(cols),
        prefix_task_rows=None if rows is None else torch.ones(rows),
    )
    assert "prefix_task" in refusal(tmp_path, spec).message


def test_a_small_multitask_file_cannot_unfold_to_gigabytes(tmp_path: Path, spec: ModelSpec) -> None:
    n, wide = 512, replace(spec, hidden_size=1024, max_model_len=1024)
    edit_json(peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING") / CONFIG, num_virtual_tokens=n)
    edit_tensors(
        tmp_path,
        prompt_embeddings=torch.ones(n, 1024, dtype=torch.float16),
        prefix_task_cols=torch.ones(1000, n, 1, dtype=torch.float16),
        prefix_task_rows=torch.ones(1000, 1, 1024, dtype=torch.float16),
    )
    with pytest.raises(InvalidSoftPrompt, match="take more than"):
        load_soft_prompts(tmp_path, wide, n)


def test_a_multitask_factor_of_high_rank_is_refused_before_it_is_read(tmp_path: Path, spec: ModelSpec) -> None:
    wide = replace(spec, hidden_size=2048, max_model_len=1024)
    edit_json(peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING") / CONFIG, num_virtual_tokens=1)
    shapes = {
        "prompt_embeddings": [1, 2048],
        "prefix_task_cols": [20, 1, 2048],
        "prefix_task_rows": [20, 2048, 2048],
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    write_safetensors(tmp_path / TENSORS, header, b"")
    with (tmp_path / TENSORS).open("r+b") as file:  # 336 MB of holes
        file.truncate((tmp_path / TENSORS).stat().st_size + at)
    with pytest.raises(InvalidSoftPrompt, match="take more than"):
        load_soft_prompts(tmp_path, wide, 16)


def test_a_multitask_row_that_overflows_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    edit_tensors(peft_directory(tmp_path, "MULTITASK_PROMPT_TUNING"), prefix_task_cols=torch.full((3, 5, 2), 3e38))
    assert "not finite" in refusal(tmp_path, spec).message
