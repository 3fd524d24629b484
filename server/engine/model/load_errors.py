"""Turns errors of the libraries that read a model into one sentence with a remedy."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers

from server.engine.attention.interface import ATTENTION_NAME
from server.errors import ConfigurationError, InsufficientMemory, PreludeError, UnsupportedModel

REMEDY = "Download or convert the model again, or let PRELUDE_MODEL name another one."
NAME_A_MODEL = "Name a directory with config.json and safetensors, a GGUF file, or a hub id such as org/name."
MAKE_ROOM = "Free memory, or choose a smaller model or a quantised checkpoint."
MOST_CHARACTERS = 300

_MEANINGS = {
    "ignore_mismatched_sizes": "their shapes differ from those in config.json",
    "weights_only": "its file is a pickle instead of plain tensors, and Prelude never runs what a pickle holds",
    "Unrecognized configuration class": "it is no language model that generates text",
    "trust_remote_code": "it needs code of its own, which is never run here",
}
"""What messages that contain these words mean."""


def broken(message: str) -> ConfigurationError:
    """The error of a model whose files have to be replaced."""
    return ConfigurationError(message, remedy=REMEDY)


@contextmanager
def refusing_own_choice(kind: str) -> Iterator[None]:
    """Context manager: raise UnsupportedModel for a model that looks its attention up in a table of its own."""
    try:
        yield
    except KeyError as exc:
        if exc.args != (ATTENTION_NAME,):
            raise
        raise UnsupportedModel(
            f"{kind} chooses its attention from a list of its own and not through transformers' AttentionInterface."
        ) from exc


@contextmanager
def as_sentence(problem: str, remedy: str = REMEDY) -> Iterator[None]:
    """Context manager: turn any exception but a PreludeError into a ConfigurationError that begins with `problem`."""
    try:
        yield
    except PreludeError:
        raise
    except Exception as exc:  # the libraries that read models raise exceptions of any class
        if _is_out_of_memory(exc):
            raise InsufficientMemory(f"{problem}: {_reason(exc)}.", remedy=MAKE_ROOM) from exc
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            remedy = "Make room on the disk."
        elif isinstance(exc, ImportError):
            remedy = "Install what is missing where Prelude runs, or choose a model that does not need it."
        elif "does not recognize this architecture" in str(exc):
            remedy = "Update transformers (pip install --upgrade transformers), or choose another model."
        raise ConfigurationError(f"{problem}: {_reason(exc)}.", remedy=remedy) from exc


def _is_out_of_memory(exc: Exception) -> bool:
    """Whether memory ran out; torch's CPU allocator has no exception class of its own."""
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(exc)


def _reason(exc: Exception) -> str:
    """An exception's message on one line of bounded length."""
    text = " ".join(str(exc).split())
    if isinstance(exc, LookupError | AssertionError) or not text:
        text = f"{type(exc).__name__} {text}".strip()
    if "does not recognize this architecture" in text:
        named = re.search(r"model type `([^`]{1,80})`", text)
        kind = repr(named[1]) if named else "such a"
        text = f"transformers {transformers.__version__} knows no {kind} models"
    text = next((meaning for words, meaning in _MEANINGS.items() if words in text), text)
    return (text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…").rstrip(".")
