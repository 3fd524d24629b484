"""Checks before any weight is loaded that the needed packages are installed and that the weights fit into memory.

When memory runs out, Linux kills the process silently, and CUDA fails only after minutes of loading.
"""

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers.auto import AutoHfQuantizer

from server.engine.model.load_errors import broken
from server.errors import InsufficientMemory, UnsupportedModel

GiB = 2**30

NEEDED = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto-round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "eetq": ("kernels",),
    "fbgemm_fp8": ("fbgemm-gpu",),
    "fp_quant": ("fp-quant",),
    "gptq": ("gptqmodel", "optimum"),
    "higgs": ("flute-kernel",),
    "hqq": ("hqq",),
    "quanto": ("optimum-quanto",),
    "quark": ("amd-quark",),
    "spqr": ("spqr-quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
"""Additional packages that transformers needs, by `quant_method`."""

CGROUP = Path("/sys/fs/cgroup")
CGROUP_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")

UNPACKED = "compressed-tensors"
"""The `quant_method` whose weights are de-quantised on loading; otherwise its package would do so at the first step."""

HALF_BYTE = "mxfp4"
"""The `quant_method` whose bytes contain two numbers each."""

MADE_UP = 2**26
"""Number of missing values that transformers may initialise; the missing weights are then refused by name."""

FLOATS = {"F64", "F32", "F16", "BF16"}
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes per number by safetensors' name of the dtype; 1 for all other dtypes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint: safetensors' name of its dtype, and its number of values."""

    dtype: str
    numbers: int


def auto_class(config: PretrainedConfig) -> Any:
    """The class that loads a model; of a model that also reads images, the text part is served."""
    kind = config.model_type
    is_multimodal = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM


def made(config: PretrainedConfig) -> dict[str, Stored]:
    """The weights of a model with this config, which is created without allocating memory."""
    with torch.device("meta"):
        module = auto_class(config).from_config(config, attn_implementation="eager")
    return {name: Stored("F32", parameter.numel()) for name, parameter in module.named_parameters()}


def _quantisation_fields(config: PretrainedConfig) -> dict[str, Any] | None:
    found: Any = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def quantisation(config: PretrainedConfig) -> str | None:
    """The `quant_method` of a checkpoint; None if it is not quantised."""
    fields = _quantisation_fields(config)
    if fields is None:
        return None
    if fields.get("load_in_8bit") or fields.get("load_in_4bit"):
        return "bitsandbytes"
    return str(fields.get("quant_method"))


def unpack(config: PretrainedConfig) -> bool:
    """If a checkpoint must be de-quantised on loading, set this in its config and return True."""
    if quantisation(config) != UNPACKED:
        return False
    config.quantization_config = config.quantization_config | {"dequantize": True}
    return True


def refuse_missing_packages(location: str, config: PretrainedConfig) -> None:
    """Raise UnsupportedModel for a quantisation that transformers does not know, or that needs missing packages."""
    method = quantisation(config)
    if missing := [name for name in NEEDED.get(method or "", ()) if not _is_installed(name)]:
        raise UnsupportedModel(
            f"The weights of {location} are quantised with {method}, and reading them needs packages that are not "
            f"installed: {', '.join(missing)}.",
            remedy=f"Install what is missing where Prelude runs (pip install {' '.join(missing)}), or choose a "
            "checkpoint that is not quantised.",
        )
    fields = _quantisation_fields(config)
    if fields is not None and not AutoHfQuantizer.supports_quant_method(fields):  # type: ignore[no-untyped-call]
        raise UnsupportedModel(
            f"The weights of {location} are quantised with {method}, which transformers {transformers.__version__} "
            "cannot read: it would take the quantised numbers for the weights.",
            remedy="Choose a checkpoint that is not quantised, or one with a method that docs/models.md lists.",
        )


def refuse_other_sizes(location: str, weights: Iterable[Stored], config: PretrainedConfig) -> None:
    """Refuse a config that requires far more values than the checkpoint contains, and name both numbers.

    transformers would initialise all missing weights before it reports them, without any limit on memory and time.
    """
    quantised = quantisation(config) is not None
    # A quantised number takes at least one bit, and may be packed into integers of any size.
    held = sum(one.numbers * (8 * SIZES.get(one.dtype, 1) if quantised else 1) for one in weights)
    expected = sum(one.numbers for one in made(config).values())
    if expected > 2 * held + MADE_UP:
        raise broken(
            f"The weights of {location} cannot be loaded: the shapes in config.json hold {expected:,} numbers in "
            f"all, and the files hold {held:,}."
        )


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def refuse_too_large(
    location: str, weights: Iterable[Stored], method: str | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise InsufficientMemory for a model whose `weight_bytes` exceed the free memory."""
    # Linux frees its file cache, for example of the weights themselves, when memory is needed.
    need = weight_bytes(weights, method, device, dtype)
    free = free_memory(device, with_cache=True)
    if need <= free:
        return
    remedy = "Choose a smaller model or a quantised checkpoint of it, or free memory."
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        remedy = f"{device} has {total / GiB:,.1f} GiB in all, and one model is served by one GPU. {remedy}"
    elif dtype.itemsize > torch.bfloat16.itemsize:
        remedy = f"PRELUDE_DTYPE=bfloat16 halves it. {remedy}"
    raise InsufficientMemory(
        f"The weights of {location} take {need / GiB:,.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
        f"{free / GiB:,.1f} GiB are free on {device}.",
        remedy=remedy,
    )


def weight_bytes(weights: Iterable[Stored], method: str | None, device: torch.device, dtype: torch.dtype) -> int:
    """Minimum number of bytes that the stored weights take on a device, with floating-point numbers in `dtype`.

    `method` is the checkpoint's `quant_method`.
    """
    becomes_plain = _becomes_plain(method, device)
    total = 0
    for stored in weights:
        if stored.dtype in FLOATS or (becomes_plain and stored.dtype.startswith("F8")):
            total += stored.numbers * dtype.itemsize
        elif becomes_plain and method == HALF_BYTE and stored.dtype == "U8":
            total += stored.numbers * 2 * dtype.itemsize
        else:
            total += stored.numbers * SIZES.get(stored.dtype, 1)
    return total


def _becomes_plain(method: str | None, device: torch.device) -> bool:
    """Whether transformers de-quantises the weights, because the device cannot multiply quantised ones."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return device.type == "cpu"
    capability = torch.cuda.get_device_capability(device)
    if method == HALF_BYTE:
        return capability < (7, 5) or not _is_installed("kernels")
    return method == "fp8" and capability < (8, 9)


def free_memory(device: torch.device, *, with_cache: bool = False) -> int:
    """Bytes that can still be allocated on a device; in a container, within its limit.

    With `with_cache`, caches count as free: on CUDA, unused memory that torch's allocator has reserved, which may be
    fragmented; on a CPU, the container's file cache.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if with_cache else 0
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min(int(psutil.virtual_memory().available), _container_headroom(with_cache=with_cache))


def _container_headroom(*, with_cache: bool) -> int:
    """Bytes left within the cgroup's limit; a very large number without a limit."""
    for folder, limit_file, used_file, cached in (
        (CGROUP, "memory.max", "memory.current", {"active_file", "inactive_file"}),
        (CGROUP / "memory", *CGROUP_V1_FILES, {"total_active_file", "total_inactive_file"}),
    ):
        try:
            headroom = int((folder / limit_file).read_text()) - int((folder / used_file).read_text())
            if with_cache:
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                headroom += sum(int(value) for name, value in lines if name in cached)
            return max(0, headroom)
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return 2**62
