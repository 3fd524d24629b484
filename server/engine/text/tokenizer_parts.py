"""The parts of a tokenizer, which the tokenizers library exposes only in serialised form."""

import json
from collections.abc import Iterator
from typing import Any

NESTED = ("decoders", "normalizers", "pretokenizers")


def parts_of(component: Any) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, each with its `type`; none for `None`."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        yield part
        for name in NESTED:
            waiting += part.get(name, ())


def byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's alphabet: printable bytes are represented by themselves, other bytes by characters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    pairs = [*((byte, byte) for byte in plain), *((256 + i, byte) for i, byte in enumerate(others))]
    return {chr(character): bytes([byte]) for character, byte in pairs}
