"""Kinds of fields that several of OpenAI's bodies have."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from server.api.schemas import Text, is_text

MAX_BIASES = 1024
MAX_STOPS = 16

_ID = re.compile(r"[0-9]{1,9}")


def _not_offered(value: Any) -> None:
    if value is not None:
        raise ValueError("not offered by this server; leave it out")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _are_ids(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not _ID.fullmatch(key):
            raise ValueError(f"{key[:80]!r} is not the id of a token")
    return biases


def _is_schema(value: Any) -> Any:
    """What the union itself would refuse in words of its own, a sentence for each of its members."""
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema, as an object or as text")
    return is_text(value) if isinstance(value, str) else value


Schema = Annotated[dict[str, Any] | str, BeforeValidator(_is_schema)]

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]

NotOffered = Annotated[None, BeforeValidator(_not_offered), Field(description="Not offered.")]
"""A field of OpenAI's that does something there and could do nothing here."""

Stop = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]

LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES), AfterValidator(_are_ids)
]
