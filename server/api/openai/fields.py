"""Types of fields that several of OpenAI's bodies share."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from server.api.schemas import Text, is_text
from server.validation import without_nulls

MAX_BIASES = 1024
MAX_STOPS = 16

_ID = re.compile(r"[0-9]{1,9}")


class Idle:
    """Marks an OpenAI field that accepts only values without effect."""


def _not_offered(value: Any) -> None:
    if value is not None:
        raise ValueError("not supported by this server; leave it out")


def _only(*idle: Any) -> BeforeValidator:
    """A validator that refuses all other values with a one-sentence error."""
    named = " or ".join(json.dumps(value) for value in idle)

    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(one) and value == one for one in idle):
            raise ValueError(f"not supported by this server, which takes only {named}; leave it out")
        return value

    return BeforeValidator(check)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _are_ids(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not _ID.fullmatch(key):
            raise ValueError(f"{key[:80]!r} is not the id of a token")
    return biases


def _is_schema(value: Any) -> Any:
    """Refuse other types here: pydantic's union would report one error for each of its members."""
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema, as an object or as text")
    return is_text(value) if isinstance(value, str) else value


Schema = Annotated[dict[str, Any] | str, BeforeValidator(_is_schema)]

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]

NotOffered = Annotated[None, BeforeValidator(_not_offered), Field(description="Not offered."), Idle]
"""An OpenAI field that has an effect there and cannot have one here."""

NoList = Annotated[
    Annotated[list[Any], Field(max_length=0)] | None,
    _only([]),
    Field(description="Not offered; an empty list asks for nothing."),
    Idle,
]
NoText = Annotated[
    Annotated[str, Field(max_length=0)] | None,
    _only(""),
    Field(description="Not offered; an empty text asks for nothing."),
    Idle,
]
NoTool = Annotated[
    Literal["none", "auto"] | None,
    _only("none", "auto"),
    Field(description="Neither has an effect, because there are no tools."),
    Idle,
]
NoReasoning = Annotated[Literal["none"] | None, _only("none"), Field(description="Only none."), Idle]
UsualVerbosity = Annotated[Literal["medium"] | None, _only("medium"), Field(description="Only medium."), Idle]
OnlyText = Annotated[list[Literal["text"]] | None, _only(["text"]), Field(description="Only text."), Idle]
"""The only accepted value requests what the server does anyway."""

Stop = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    AfterValidator(_are_ids),
    BeforeValidator(without_nulls, json_schema_input_type=dict[str, Annotated[float, Field(ge=-100, le=100)] | None]),
]
