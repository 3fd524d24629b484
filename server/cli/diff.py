"""The differences between two soft prompts: manifests, configs, and tensors by virtual token."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from server.cli.files import CONFIG_FILE, MANIFEST_FILE, TENSOR_FILE, files_of
from server.errors import InvalidSoftPrompt
from server.soft_prompts.manifest import parse_json_object

Rows = NDArray[np.float64]
"""`[virtual tokens, width]`."""

WHERE_AND_WHEN = frozenset({"task", "created_at"})
"""Manifest fields that a server writes about a downloaded copy, not about the soft prompt."""
DERIVED = frozenset({"digest", "prefix_hash", "peft_type", "num_virtual_tokens", "hidden_size"})
"""Manifest fields that repeat facts about the tensor and config, which are compared directly."""

_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> Rows | None:
        """The numbers `[rows, width]` in float64; None for an empty tensor or an unsupported dtype."""
        if self.dtype not in _NUMPY_DTYPES or not self.shape or not self.data:
            return None
        values = np.frombuffer(self.data, dtype=_NUMPY_DTYPES[self.dtype])
        if self.dtype == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype(np.float64).reshape(self.shape[0], -1)


@dataclass(frozen=True)
class ComparedSoftPrompt:
    """One side of a comparison."""

    name: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class FieldChange:
    """A field with different values on the two sides; None if a side lacks it."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class RowChange:
    """One virtual token on both sides. The cosine is None if a norm is 0; figures are None if not finite."""

    row: int
    cosine: float | None
    norm_a: float | None
    norm_b: float | None
    max_difference: float | None


@dataclass(frozen=True)
class TensorChange:
    """A tensor on both sides; `rows` compares the rows that both have, if the widths are equal."""

    name: str
    dtype_a: str | None
    dtype_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    identical: bool
    max_difference: float | None = None
    rows: tuple[RowChange, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two soft prompts side by side."""

    a: str
    b: str
    manifest: tuple[FieldChange, ...]
    config: tuple[FieldChange, ...]
    tensors: tuple[TensorChange, ...]

    @property
    def identical(self) -> bool:
        """True if nothing differs."""
        return not self.manifest and not self.config and all(tensor.identical for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {"identical": self.identical, **asdict(self)}


def read_content(directory: Path, name: str) -> ComparedSoftPrompt:
    """Read a PEFT directory for a comparison; raises InvalidSoftPrompt."""
    files = {file.name: file.read_bytes() for file in files_of(directory, name)}
    try:
        tensors = {
            key: Tensor(value["dtype"], tuple(value["shape"]), bytes(value["data"]))
            for key, value in deserialize(files[TENSOR_FILE])  # type: ignore[no-untyped-call]
        }
    except SafetensorError as exc:
        raise InvalidSoftPrompt(f"{TENSOR_FILE} of {name} is damaged: {exc}.") from exc
    config = parse_json_object(files[CONFIG_FILE], f"{CONFIG_FILE} of {name}")
    manifest = parse_json_object(files.get(MANIFEST_FILE, b"{}"), f"{MANIFEST_FILE} of {name}")
    return ComparedSoftPrompt(name, config, manifest, tensors)


def compare(a: ComparedSoftPrompt, b: ComparedSoftPrompt) -> Comparison:
    """Find all differences between two soft prompts, except their names and times of publishing."""
    names = sorted({*a.tensors, *b.tensors})
    return Comparison(
        a=a.name,
        b=b.name,
        manifest=tuple(change for change in _changes(a.manifest, b.manifest) if not _is_of_the_copy(change)),
        config=tuple(_changes(a.config, b.config)),
        tensors=tuple(_compare_tensors(name, a.tensors.get(name), b.tensors.get(name)) for name in names),
    )


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[FieldChange]:
    flat_a, flat_b = dict(_flat(a)), dict(_flat(b))
    for name in sorted({*flat_a, *flat_b}):
        change = FieldChange(name, flat_a.get(name), flat_b.get(name))
        if change.a != change.b:
            yield change


def _is_of_the_copy(change: FieldChange) -> bool:
    one_sided = change.a is None or change.b is None
    return change.name in WHERE_AND_WHEN or (one_sided and change.name in DERIVED)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _compare_tensors(name: str, a: Tensor | None, b: Tensor | None) -> TensorChange:
    rows = () if a is None or b is None or a == b else tuple(_compare_rows(a.numbers(), b.numbers()))
    return TensorChange(
        name,
        dtype_a=None if a is None else a.dtype,
        dtype_b=None if b is None else b.dtype,
        shape_a=None if a is None else a.shape,
        shape_b=None if b is None else b.shape,
        identical=a == b,
        max_difference=max((row.max_difference for row in rows if row.max_difference is not None), default=None),
        rows=rows,
    )


def _compare_rows(a: Rows | None, b: Rows | None) -> Iterator[RowChange]:
    if a is None or b is None or a.shape[1] != b.shape[1]:
        return
    for index, (row_a, row_b) in enumerate(zip(a, b, strict=False)):  # stops at the end of the shorter tensor
        with np.errstate(all="ignore"):
            norm_a, norm_b = float(np.linalg.norm(row_a)), float(np.linalg.norm(row_b))
            cosine = float(row_a @ row_b) / (norm_a * norm_b) if norm_a and norm_b else float("nan")
            difference = float(np.abs(row_a - row_b).max(initial=0.0))
        yield RowChange(index, _finite(cosine), _finite(norm_a), _finite(norm_b), _finite(difference))


def _finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON cannot represent."""
    return value if np.isfinite(value) else None
