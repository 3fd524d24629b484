"""`response_format`: a format that the answer to a chat must match."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from server.api.schemas import StrictBody


class JsonSchema(StrictBody):
    """`response_format.json_schema`."""

    name: str = Field(max_length=64, description="Has no effect.")
    description: str | None = Field(None, description="Has no effect: the model does not see it.")
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema that the answer must match.")
    strict: bool | None = Field(None, description="Has no effect: the schema always holds.")


class ResponseFormat(StrictBody):
    """`response_format` in OpenAI's form, or in text-generation-inference's, to which huggingface_hub converts it."""

    type: Literal["text", "json_object", "json_schema", "json"]
    value: dict[str, Any] | None = Field(
        None,
        validate_default=True,
        description="With json_object or json: a JSON schema. With json_schema, in its place: {name, schema}.",
    )
    json_schema: JsonSchema | None = Field(None, validate_default=True)

    @field_validator("value")
    @classmethod
    def _has_a_type_that_takes_it(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        kind = info.data.get("type")
        if value is not None and kind == "text":
            raise ValueError("belongs to the types json_object, json and json_schema")
        if value is None and kind == "json":
            raise ValueError("is needed by the type json")
        if value is not None and kind == "json_schema":
            _check_named_schema(value)
        return value

    @field_validator("json_schema")
    @classmethod
    def _is_where_it_belongs(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        has_value = info.data.get("value") is not None
        if "type" in info.data and "value" in info.data:
            if info.data["type"] != "json_schema" and value is not None:
                raise ValueError("belongs to the type json_schema")
            if info.data["type"] == "json_schema" and (value is not None) == has_value:
                raise ValueError("is needed by the type json_schema, or value in its place, and not both")
        return value

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must match; None if any text is allowed."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.schema_
        if self.value is None:
            return {"type": "object"}
        schema: dict[str, Any] = self.value["schema"] if self.type == "json_schema" else self.value
        return schema


def _check_named_schema(value: dict[str, Any]) -> None:
    """Refuse a value that is not text-generation-inference's {name, schema}."""
    known = [field.alias or name for name, field in JsonSchema.model_fields.items()]
    unknown = next((name for name, item in value.items() if name not in known and item is not None), None)
    if unknown is not None:
        raise ValueError(f"has an unknown field {unknown[:80]}; send name and schema")
    if not isinstance(value.get("schema"), dict):
        raise ValueError("needs a schema, an object, with the type json_schema")
