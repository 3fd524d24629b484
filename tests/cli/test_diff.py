from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.cli.diff import Comparison, FieldChange, compare, read_content
from server.errors import InvalidSoftPrompt

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CONFIG = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}


def directory(
    path: Path, tensor: torch.Tensor, manifest: dict[str, Any] | None = None, config: dict[str, Any] = CONFIG
) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    if manifest is not None:
        (path / "manifest.json").write_text(json.dumps(manifest))
    save_file({"prompt_embeddings": tensor}, path / "adapter_model.safetensors")
    return path


def compared(a: Path, b: Path) -> Comparison:
    return compare(read_content(a, "a"), read_content(b, "b"))


def random(rows: int = 3, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_content_is_identical_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random().to(dtype)
    result = compared(
        directory(tmp_path / "a", tensor, {"task": "x"}), directory(tmp_path / "b", tensor, {"task": "x"})
    )
    assert result.identical
    assert (result.manifest, result.config) == ((), ())
    assert result.tensors[0].dtype_a == DTYPES[dtype]
    assert result.tensors[0].rows == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_compared_as_torch_compares_them(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = random().to(dtype), random(seed=1).to(dtype)
    result = compared(directory(tmp_path / "a", a), directory(tmp_path / "b", b))
    assert not result.identical
    tensor = result.tensors[0]
    assert not tensor.identical
    wide_a, wide_b = a.double(), b.double()
    assert tensor.max_difference == pytest.approx(float((wide_a - wide_b).abs().max()))
    cosines = torch.nn.functional.cosine_similarity(wide_a, wide_b, dim=1).tolist()
    assert [row.row for row in tensor.rows] == [0, 1, 2]
    assert [row.cosine for row in tensor.rows] == pytest.approx(cosines)
    assert [row.norm_a for row in tensor.rows] == pytest.approx(wide_a.norm(dim=1).tolist())
    assert [row.norm_b for row in tensor.rows] == pytest.approx(wide_b.norm(dim=1).tolist())
    assert [row.max_difference for row in tensor.rows] == pytest.approx((wide_a - wide_b).abs().amax(1).tolist())


def test_the_same_numbers_in_another_dtype_are_not_identical(tmp_path: Path) -> None:
    tensor = random().bfloat16()
    result = compared(directory(tmp_path / "a", tensor), directory(tmp_path / "b", tensor.float()))
    assert not result.identical
    assert (result.tensors[0].dtype_a, result.tensors[0].dtype_b) == ("BF16", "F32")
    assert result.tensors[0].max_difference == 0


def test_the_same_bytes_in_another_dtype_are_not_identical(tmp_path: Path) -> None:
    tensor = random().bfloat16()
    result = compared(directory(tmp_path / "a", tensor), directory(tmp_path / "b", tensor.view(torch.float16)))
    assert not result.identical


def test_only_fields_that_differ_are_told_and_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    a = {"task": "x", "labels": ["a", "b"], "metrics": {"loss": 1.0, "rows": 3}, "licence": None}
    b = {"task": "x", "labels": ["a"], "metrics": {"loss": 2.0, "rows": 3}, "description": "new"}
    result = compared(
        directory(tmp_path / "a", random(), a),
        directory(tmp_path / "b", random(), b, {**CONFIG, "inference_mode": True, "token_dim": None}),
    )
    assert result.manifest == (
        FieldChange("description", None, "new"),
        FieldChange("labels", ["a", "b"], ["a"]),
        FieldChange("metrics.loss", 1.0, 2.0),
    )
    assert result.config == (FieldChange("inference_mode", None, True),)
    assert not result.identical


@pytest.mark.parametrize("field", ["manifest", "config"])
def test_one_field_is_enough_to_differ(tmp_path: Path, field: str) -> None:
    changed: dict[str, Any] = {field: {**CONFIG, "more": 1}}
    a = directory(tmp_path / "a", random(), CONFIG)
    assert not compared(a, directory(tmp_path / "b", random(), **{"manifest": CONFIG, **changed})).identical


def test_a_directory_without_a_manifest_is_compared_as_one_with_an_empty_one(tmp_path: Path) -> None:
    result = compared(directory(tmp_path / "a", random()), directory(tmp_path / "b", random(), {}))
    assert result.identical


def test_more_virtual_tokens_are_compared_as_far_as_both_go(tmp_path: Path) -> None:
    tensor = random(5)
    result = compared(directory(tmp_path / "a", tensor[:3].clone()), directory(tmp_path / "b", tensor))
    change = result.tensors[0]
    assert (change.shape_a, change.shape_b) == ((3, 8), (5, 8))
    assert not change.identical
    assert [row.max_difference for row in change.rows] == [0, 0, 0]


def test_another_width_is_told_by_its_shape_alone(tmp_path: Path) -> None:
    tensor = compared(directory(tmp_path / "a", random()), directory(tmp_path / "b", random(width=4))).tensors[0]
    assert (tensor.identical, tensor.max_difference, tensor.rows) == (False, None, ())


def test_a_tensor_that_one_side_lacks_is_told(tmp_path: Path) -> None:
    a, b = directory(tmp_path / "a", random()), directory(tmp_path / "b", random())
    save_file({"prompt_embeddings": random(), "more": random()}, b / "adapter_model.safetensors")
    more, same = compared(a, b).tensors
    assert (more.name, more.shape_a, more.shape_b, more.identical) == ("more", None, (3, 8), False)
    assert same.identical


def test_rows_of_zeros_and_numbers_that_are_none_have_no_figures_and_are_json(tmp_path: Path) -> None:
    a, b = random(), random(seed=1)
    a[0], a[1, 0], b[2, 3] = 0, float("nan"), float("inf")
    result = compared(directory(tmp_path / "a", a), directory(tmp_path / "b", b))
    zero, nan, infinite = result.tensors[0].rows
    assert (zero.cosine, zero.norm_a) == (None, 0)
    assert (nan.cosine, nan.norm_a, nan.max_difference) == (None, None, None)
    assert (infinite.norm_b, infinite.max_difference) == (None, None)
    assert result.tensors[0].max_difference == zero.max_difference
    json.dumps(result.as_dict(), allow_nan=False)


def test_other_dtypes_are_compared_by_their_bytes(tmp_path: Path) -> None:
    integers = torch.arange(24, dtype=torch.uint8).reshape(3, 8)
    a = directory(tmp_path / "a", integers)
    assert compared(a, directory(tmp_path / "b", integers)).identical
    assert compared(a, directory(tmp_path / "c", integers + 1)).tensors[0].rows == ()


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("adapter_model.safetensors", b"damaged", "adapter_model.safetensors of a is damaged"),
        ("adapter_config.json", b"{", "adapter_config.json of a is not valid JSON"),
        ("manifest.json", b"[]", "manifest.json of a must hold a JSON object"),
    ],
)
def test_a_damaged_side_is_told_by_its_file(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    path = directory(tmp_path / "a", random())
    (path / name).write_bytes(data)
    with pytest.raises(InvalidSoftPrompt, match=told):
        read_content(path, "a")


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_a_tensor_without_numbers_is_compared_by_its_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    a, b = directory(tmp_path / "a", torch.zeros(shape)), directory(tmp_path / "b", torch.zeros(0, 4))
    change = compared(a, b).tensors[0]
    assert (change.shape_a, change.identical, change.rows) == (shape, False, ())


def test_what_a_manifest_says_of_the_copy_does_not_count(tmp_path: Path) -> None:
    a = {"task": "x", "created_at": "2026-01-01", "digest": "d", "hidden_size": 8, "labels": ["a"]}
    bare = compared(directory(tmp_path / "a", random(), a), directory(tmp_path / "b", random(), {"labels": ["a"]}))
    assert bare.identical
    other = directory(tmp_path / "c", random(), {"task": "y", "created_at": "2026-01-02", "digest": "e"})
    result = compared(tmp_path / "a", other)
    assert result.manifest == (FieldChange("digest", "d", "e"), FieldChange("labels", ["a"], None))
