"""Limits of a manifest. Only a publish checks them: what a store already holds is read, however large."""

from __future__ import annotations

import json
from typing import Any

from server.errors import InvalidSoftPrompt
from server.soft_prompts.manifest import MANIFEST_NAME, Manifest

MAX_MANIFEST_BYTES = 2**16
MAX_ENTRIES = 5000
"""Fields and items of all objects and lists of a manifest."""
MAX_DESCRIPTION = 1000
"""Characters; every list of tasks shows them."""
MAX_METRICS_BYTES = 2**12
"""As JSON; every list of versions shows them."""
MAX_LABELS = 500
MAX_LABEL_BYTES = 2**14
"""Of all labels together. No text has more tokens than bytes, so this bounds their tokens too."""
MAX_ROWS_BYTES = 2**22
"""What the rows of a multitask soft prompt may keep of their manifest: every one keeps what changes answers."""


def check_manifest(manifest: Manifest, rows: int = 1) -> None:
    """Refuse a manifest that is too large to be kept in memory, shown in lists, or used by requests.

    Args:
        manifest: of a soft prompt that is to be published.
        rows: tasks that it is for, more than one for a multitask soft prompt.

    Raises:
        InvalidSoftPrompt: says how much it has of what, and how much it may have.
    """
    size = len(manifest.to_json().encode())
    labels = manifest.labels or ()
    metrics = len(json.dumps(manifest.metrics, ensure_ascii=False).encode())
    for held, limit, what in (
        (num_entries(manifest.model_dump(mode="json", exclude_none=True)), MAX_ENTRIES, "fields and items"),
        (size, MAX_MANIFEST_BYTES, "bytes"),
        (len(manifest.description or ""), MAX_DESCRIPTION, "characters of description"),
        (metrics, MAX_METRICS_BYTES, "bytes of metrics"),
        (len(labels), MAX_LABELS, "labels"),
        (sum(len(label.encode()) for label in labels), MAX_LABEL_BYTES, "bytes of labels"),
        (rows * len(manifest.answers_identity().encode()), MAX_ROWS_BYTES, f"bytes to keep for {rows:,} tasks"),
    ):
        if held > limit:
            raise InvalidSoftPrompt(
                f"{MANIFEST_NAME} has {held:,} {what}; at most {limit:,} are taken.",
                remedy="Keep in it what people and requests need, and the rest in another file.",
            )


def num_entries(value: Any) -> int:
    """Fields and items of all objects and lists in a JSON value."""
    total, level = 0, [value]
    while level:
        item = level.pop()
        children = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else ()
        total += len(children)
        level += children
    return total
