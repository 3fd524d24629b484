"""Loads a model's modules and tokenizer from its files, or reports in one sentence what is wrong with them.

The files are checked before transformers reads them: transformers initialises missing weights randomly, ignores
settings that it cannot read, and asks on the terminal whether to run code from the model's directory.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from server.engine.attention.interface import ATTENTION_NAME, register_attention
from server.engine.model.compatibility import refuse_unsupported
from server.engine.model.load_errors import NAME_A_MODEL, as_sentence, broken, refusing_own_choice
from server.engine.model.preflight import (
    FLOATS,
    Stored,
    auto_class,
    made,
    quantisation,
    refuse_missing_packages,
    refuse_other_sizes,
    refuse_too_large,
    unpack,
)
from server.errors import ConfigurationError

log = logging.getLogger(__name__)

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
SETTINGS_FILES = (
    *(CONFIG, "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", INDEX),
)
"""Optional files that contain one JSON object each."""
VOCABULARIES = (".model", ".tiktoken", "tekken.json")
"""Endings of tokenizer files whose names contain neither "tokenizer" nor "vocab"."""
SHOWN = 3

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks)\.(\d+)\.")


def load(location: str, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer from a directory, or by a hub id; code in the directory is never run.

    Raises ConfigurationError for files that are missing, broken or inconsistent, and UnsupportedModel for a model that
    cannot be served.
    """
    directory = Path(location)
    weights: dict[str, Stored] = {}
    if directory.is_dir():
        weights = check_files(directory)
    else:
        _check_hub_id(location)
    with quietly(location), as_sentence(f"The model {location} cannot be loaded"):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        refuse_unsupported(config)
        refuse_missing_packages(location, config)
    _check_layers(location, weights, config)
    register_attention()
    with (
        quietly(location),
        as_sentence(f"The weights of {location} cannot be loaded"),
        refusing_own_choice(config.model_type),
    ):
        if weights:
            refuse_other_sizes(location, weights.values(), config)
        if unpack(config) or (not weights and quantisation(config) is None):
            weights = made(config)
        refuse_too_large(location, weights.values(), quantisation(config), device, dtype)
        loaded: Any = auto_class(config).from_pretrained(
            location,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=False,
            output_loading_info=True,
            # On a CPU the file is mapped; on other devices weights are copied one by one, so the host need not hold
            # them all.
            device_map=None if device.type == "cpu" else {"": device},
        )
        module: PreTrainedModel = loaded[0]
    refuse_missing(location, loaded[1])
    with quietly(location), as_sentence(f"The tokenizer of {location} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        if not tokenizer.encode("Hello", add_special_tokens=False):
            raise broken(f"The tokenizer of {location} has no token for any text.")
    return module, tokenizer


@contextmanager
def quietly(location: str) -> Iterator[None]:
    """Context manager: silence transformers' messages about problems that Prelude reports itself.

    Its progress bars appear only on a terminal, and only for models from the hub, which take long to download.
    """
    verbosity = transformers_logging.get_verbosity()
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if Path(location).is_dir() or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars and are_progress_bars_disabled():
            enable_progress_bars()
        elif not hub_bars:
            disable_progress_bars()


def refuse_missing(location: str, info: Mapping[str, Any]) -> None:
    """Refuse a model with missing weights, which transformers would initialise randomly, and name some of them."""
    if missing := sorted(info["missing_keys"]):
        raise broken(f"The weights of {location} lack {len(missing)} tensors of its configuration: {_some(missing)}.")
    if unused := sorted(info["unexpected_keys"]):
        log.warning("%s holds %d weights that the model does not use: %s", location, len(unused), _some(unused))


def check_files(directory: Path) -> dict[str, Stored]:
    """Return the weights in safetensors files, by name, of a directory whose files are all there and readable.

    The ConfigurationError names the first file that is missing, truncated or unreadable.
    """
    with as_sentence(f"{directory} cannot be read", "Let the server's user read the directory and its files."):
        names = {path.name for path in directory.iterdir()}
        odd = sorted(name for name in names if _is_no_file(directory / name))
    if odd:  # opening a pipe would silently wait for its writer
        raise ConfigurationError(
            f"{directory} holds something that is neither a file nor a directory: {_some(odd)}.",
            remedy="Put the model's files in its place.",
        )
    if CONFIG not in names:
        message = f"{directory} holds no {CONFIG}, so it is not a model's directory."
        raise ConfigurationError(message, remedy=NAME_A_MODEL)
    found = {name: _object_in(directory / name) for name in SETTINGS_FILES if name in names}
    for template in (directory / name for name in names if name.endswith(".jinja")):
        with as_sentence(f"{template} is not UTF-8"):
            template.read_text(encoding="utf-8")
    if not isinstance(found[CONFIG].get("model_type"), str):
        raise broken(f"{directory / CONFIG} has no model_type.")
    if not any("vocab" in name or name.startswith("tokenizer.") or name.endswith(VOCABULARIES) for name in names):
        raise broken(f"{directory} holds no tokenizer (tokenizer.json).")
    weights: dict[str, Stored] = {}
    for shard in _shards(directory, names, found.get(INDEX)):
        with as_sentence(f"{directory / shard} is cut or not a safetensors file"):
            weights |= _tensors_of(directory / shard)
    # Masks and similar tensors may be integers.
    odd = [name for name, stored in weights.items() if stored.dtype not in FLOATS and name.endswith("weight")]
    if odd and "quantization_config" not in found[CONFIG]:
        raise broken(
            f"{directory} holds {len(odd)} weights as whole numbers or in 8 bits and fewer, and {CONFIG} has no "
            f"quantization_config: {_some(odd)}."
        )
    return weights


def _is_no_file(path: Path) -> bool:
    """Whether the path is a pipe, a socket or a device, or a link to one."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _object_in(path: Path) -> dict[str, Any]:
    with as_sentence(f"{path} is not valid JSON"):
        value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise broken(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _shards(directory: Path, names: set[str], index: dict[str, Any] | None) -> list[str]:
    """The safetensors files with the weights; empty for a model in torch's own format."""
    if WEIGHTS in names:
        return [WEIGHTS]
    if index is None:
        if not any(name.endswith((".bin", ".safetensors")) for name in names):
            raise broken(f"{directory} holds no weights ({WEIGHTS}, or {INDEX}).")
        return []
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise broken(f"{directory / INDEX} holds no weight_map from weights to files.")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if shard not in names]:
        count = f"{len(missing)} of the {len(shards)}"
        raise broken(f"{directory} lacks {count} files that {INDEX} names: {_some(missing)}.")
    return shards


def _tensors_of(path: Path) -> dict[str, Stored]:
    """A file's tensors by name; opening the file checks the header against the file's length."""
    with safe_open(path, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: Stored(part.get_dtype(), math.prod(part.get_shape())) for name, part in slices.items()}


def _check_layers(location: str, names: Iterable[str], config: PretrainedConfig) -> None:
    """Refuse more layers than the weights have: transformers would first create them all, without any limit."""
    numbers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    most = max(numbers) + 1 if numbers else layers
    if not 1 <= layers <= most:
        raise broken(f"{CONFIG} of {location} asks for {layers:,} layers; the weights hold {most:,}.")


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as exc:
        message = f"PRELUDE_MODEL is {name[:200]!r}: no directory, no .gguf file, and not a hub id."
        raise ConfigurationError(message, remedy=NAME_A_MODEL) from exc


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
