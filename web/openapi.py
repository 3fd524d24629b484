"""Prints the OpenAPI document of this tree, from which `npm run types` makes the types of src/api/schema.d.ts."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastapi.openapi.utils import get_openapi

from server import __version__
from server.api.app import api_routes


def without_nulls_allowed(schema: Any) -> Any:
    """The document without "unknown fields may be null", which TypeScript would take for an index of nulls."""
    if isinstance(schema, list):
        return [without_nulls_allowed(item) for item in schema]
    if isinstance(schema, dict):
        return {
            name: without_nulls_allowed(item)
            for name, item in schema.items()
            if (name, item) != ("additionalProperties", {"type": "null"})
        }
    return schema


document = get_openapi(title="Prelude", version=__version__, routes=api_routes())
json.dump(without_nulls_allowed(document), sys.stdout)
