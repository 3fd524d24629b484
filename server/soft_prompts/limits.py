"""Limits of a manifest. Only a publish checks them; a manifest that is already in a store is read as it is."""

import json
from typing import Any

from server.errors import InvalidSoftPrompt
from server.soft_prompts.manifest import MANIFEST_NAME, Manifest

MAX_MANIFEST_BYTES = 2**16
MAX_ENTRIES = 5000
"""Maximum number of fields and items in all objects and lists of a manifest."""
MAX_DESCRIPTION = 1000
"""In characters. Every list of tasks shows the description."""
MAX_METRICS_BYTES = 2**12
"""Size as JSON. Every list of versions shows the metrics."""
MAX_LABELS = 500
MAX_LABEL_BYTES = 2**14
"""Size of all labels together. A text never has more tokens than bytes, so this also limits their tokens."""
MAX_ROWS_BYTES = 2**22
"""Maximum size of the manifests of all tasks of a multitask soft prompt; each repeats the fields that change
answers."""


def check_manifest(manifest: Manifest, rows: int = 1) -> None:
    """Refuse a manifest that is too large for memory, for lists, or for requests, or that names a label twice.

    `rows` is the number of tasks of a multitask soft prompt. The InvalidSoftPrompt names the limit and the manifest's
    value, or the label.
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
    if len(set(labels)) < len(labels):
        repeated = next(label for number, label in enumerate(labels) if label in labels[:number])
        raise InvalidSoftPrompt(
            f"{MANIFEST_NAME} names the label {repeated[:80]!r} more than once.", remedy="Name each label once."
        )


def num_entries(value: Any) -> int:
    """Number of fields and items in all objects and lists of a JSON value."""
    total, level = 0, [value]
    while level:
        item = level.pop()
        children = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else ()
        total += len(children)
        level += children
    return total
