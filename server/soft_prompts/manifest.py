"""The manifest: a soft prompt's metadata.

All fields are optional, because PEFT directories have no manifest. Four fields change answers (`input_template`,
`system_message`, `generation`, `labels`) and are therefore part of a version's identity; the other fields are for
people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from server.contracts import SamplingParams, TemplatedText
from server.errors import InputTooLong, InvalidRequest, InvalidSoftPrompt
from server.validation import first_problems, without_nulls

INPUT_FIELD = "{input}"
SYSTEM_FIELD = "{system}"
SystemMessage = Literal["ignore", "refuse", "template"]
"""How a task handles a chat's system message: ignore it, refuse it with 400, or pass it to the template."""
MANIFEST_NAME = "manifest.json"
MAX_DEPTH = 64
"""Maximum nesting of objects and lists. Deeper values could be parsed, but not serialised everywhere."""
ANSWER_FIELDS = ("input_template", "system_message", "generation", "labels")


class _Part(BaseModel):
    """An object of the manifest. A null field counts as left out, whether it is known or not."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return without_nulls(value)


class GenerationDefaults(_Part):
    """Sampling defaults of a task; a request's own fields take precedence. Unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(None, max_length=16)
    seed: int | None = Field(None, ge=0, lt=2**64)

    def sampling_params(
        self,
        own: Mapping[str, Any],
        *,
        room: int,
        seed: int,
        least: str = "min_new_tokens",
        most: str = "max_new_tokens",
    ) -> SamplingParams:
        """Merge sampling parameters: the request's values, then the task's, then the server's defaults.

        Args:
            room: positions that virtual and input tokens leave free. Defaults are reduced to fit; the request's own
                values are not.
            seed: the seed if neither the request nor the task sets one.
            least: the front end's name for `min_new_tokens`, for errors.
            most: the front end's name for `max_new_tokens`, for errors.

        Raises:
            InvalidRequest: the request's minimum exceeds its maximum number of new tokens; a task's default minimum is
                reduced instead.
            InputTooLong: the request's minimum exceeds the room.
        """
        fields: dict[str, Any] = {"seed": seed, **self.model_dump(exclude_none=True), **own}
        is_own = "max_new_tokens" in own
        limit = fields.setdefault("max_new_tokens", SamplingParams().max_new_tokens)
        wanted = own.get("min_new_tokens", 0)
        if wanted > limit:
            raise InvalidRequest(
                f"{least} is {wanted:,}, but {most} is {limit:,}{'' if is_own else ' where it is left out'}.",
                remedy=f"Lower {least}, or {'raise' if is_own else 'send a higher'} {most}.",
                param=least,
            )
        if not is_own:
            if wanted > room > 0:  # without any room, the error is that the input is too long
                raise InputTooLong(
                    f"{least} is {wanted:,}, but after the input the context has room for {room:,} new tokens.",
                    remedy=f"Lower {least}, or shorten the input.",
                    param=least,
                )
            limit = max(1, min(limit, room))
        # A minimum that only the task sets is reduced to fit, like its max_new_tokens.
        return SamplingParams(
            **{**fields, "max_new_tokens": limit, "min_new_tokens": min(fields.get("min_new_tokens", 0), limit)}
        )


class BaseModelRef(BaseModel):
    """The frozen model that a soft prompt was trained on."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str | None = Field(None, max_length=1000)
    fingerprint: str | None = Field(None, max_length=256)
    """Errors quote both fields, so both have a length limit."""


class Manifest(_Part):
    """`manifest.json`. Unknown fields are preserved, because a newer Prelude may have written them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    task: str | None = None
    digest: str | None = None
    prefix_hash: str | None = None
    created_at: str | None = None
    base_model: BaseModelRef | None = None
    peft_type: str | None = None
    num_virtual_tokens: int | None = None
    hidden_size: int | None = None
    description: str | None = None
    input_template: str | None = None
    system_message: SystemMessage | None = None
    """`template` fills `{system}` in the input_template; for a task without one, the model's chat template gets the
    message."""
    generation: GenerationDefaults = GenerationDefaults()
    labels: tuple[str, ...] | None = None
    training: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    licence: str | None = None

    @field_validator("input_template")
    @classmethod
    def _template_has_one_input(cls, template: str | None) -> str | None:
        if template is not None and template.count(INPUT_FIELD) != 1:
            raise ValueError(f"input_template must contain {INPUT_FIELD} exactly once")
        return template

    @field_validator("system_message")
    @classmethod
    def _template_has_the_slot(cls, wanted: SystemMessage | None, info: ValidationInfo) -> SystemMessage | None:
        template: str | None = info.data.get("input_template")
        if wanted == "template" and template is not None and template.count(SYSTEM_FIELD) != 1:
            raise ValueError(f"with 'template', input_template must contain {SYSTEM_FIELD} exactly once")
        return wanted

    @property
    def on_system_message(self) -> SystemMessage:
        """How a chat's system message is handled; by default only the model's chat template gets it."""
        return self.system_message or self._default_on_system_message

    @property
    def _default_on_system_message(self) -> SystemMessage:
        return "template" if self.input_template is None else "ignore"

    @classmethod
    def parse(cls, data: bytes | str) -> Manifest:
        """Read manifest.json.

        Raises InvalidSoftPrompt if the file is not JSON, a field is invalid (the message names it), or the value could
        not be serialised again (lone surrogate, nested too deeply).
        """
        try:
            manifest = cls.model_validate(parse_json_object(data, "manifest.json"))
        except ValidationError as exc:
            raise InvalidSoftPrompt(
                f"manifest.json does not fit: {first_problems(exc)}.",
                remedy="Correct or leave out the fields that it names.",
            ) from exc
        try:
            manifest.to_json().encode()
        except (ValueError, RecursionError) as exc:
            raise InvalidSoftPrompt(f"manifest.json cannot be kept: {exc}.", remedy="Leave that text out.") from exc
        return manifest

    def answering(self) -> Manifest:
        """A manifest with only the fields that change answers."""
        return Manifest(**{name: getattr(self, name) for name in ANSWER_FIELDS})

    def answers_identity(self) -> str:
        """Canonical JSON of the fields that change answers; part of the digest."""
        fields: dict[str, Any] = {
            "input_template": self.input_template,
            "generation": self.generation.model_dump(mode="json", exclude_none=True),
            "labels": self.labels,
        }
        # The default is left out, so that digests of older versions stay valid.
        if self.on_system_message != self._default_on_system_message:
            fields["system_message"] = self.on_system_message
        return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    def render(self, text: str, system: str = "") -> TemplatedText:
        """Put a request's text, and a system message if the template reads it, into the template.

        Without a template the text is used unchanged, special tokens included.
        """
        if self.input_template is None:
            return TemplatedText(text)
        parts = [(self.input_template, False)]
        fields = {INPUT_FIELD: text, SYSTEM_FIELD: system} if self.system_message == "template" else {INPUT_FIELD: text}
        for name, value in fields.items():  # values are never searched for further fields
            parts = [
                piece
                for part, is_user in parts
                for piece in ([(part, True)] if is_user else _filled(part, name, value))
            ]
        return TemplatedText.of(*parts)

    def to_json(self) -> str:
        """The file's content: sorted, indented, without unset fields."""
        fields = self.model_dump(mode="json", exclude_none=True)
        if not fields.get("generation"):
            fields.pop("generation", None)
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _filled(template: str, name: str, value: str) -> Iterator[tuple[str, bool]]:
    """The parts of a template with a field replaced by the user's value."""
    before, *others = template.split(name)
    yield before, False
    for after in others:
        yield value, True
        yield after, False


_HALF_A_PAIR = re.compile("[\\ud800-\\udfff]")


def check_pairs(text: str, value: Any) -> None:
    """Raise ValueError for JSON with a lone surrogate, which could not be written to a file again."""
    if "\\ud" in text.lower() and _HALF_A_PAIR.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it holds half of a surrogate pair")


def parse_json_object(data: bytes | str, name: str) -> dict[str, Any]:
    """Parse one small JSON object of a soft prompt.

    Raises:
        InvalidSoftPrompt: the data is not UTF-8 (with or without a byte order mark), not JSON, not an object or nested
            too deeply; it contains a lone surrogate; or an object has a field twice, which parsers handle differently.
    """
    remedy = f"Mend or leave out {name}." if name == MANIFEST_NAME else None
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_without_twins)
        _check_depth(value)
        check_pairs(text, value)
    except (ValueError, RecursionError) as exc:
        raise InvalidSoftPrompt(f"{name} is not valid JSON: {exc}.", remedy=remedy) from exc
    if not isinstance(value, dict):
        raise InvalidSoftPrompt(f"{name} must hold a JSON object, not {type(value).__name__}.", remedy=remedy)
    return value


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {twin[:80]!r} twice")
    return fields


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
