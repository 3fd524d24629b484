"""The inbox: PEFT directories that people put into `prompts/`, published through the one publish path.

An entry is published on first sight and whenever its content has changed since; what was published and then deleted or
replaced by an upload does not come back by itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from server.errors import PreludeError
from server.registry.registry import Registry
from server.soft_prompts.formats import CONFIG_FILE, load_soft_prompts
from server.soft_prompts.names import check_task_name, names_of

log = logging.getLogger(__name__)


def scan_inbox(directory: Path, registry: Registry, on_entry: Callable[[str], None] = lambda name: None) -> None:
    """Publish every new or changed entry; a broken one is logged and reported, and the others are served."""
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        name = os.fsencode(entry.name).decode(errors="backslashreplace")  # a file system's names need not be text
        on_entry(name)
        try:
            if any(entry.iterdir()):
                _publish_entry(entry, registry)
            registry.inbox_errors.pop(name, None)
        except (PreludeError, OSError) as exc:
            log.warning("%s is not served: %s", directory / name, exc)
            registry.inbox_errors[name] = str(exc).encode(errors="backslashreplace").decode()


def _publish_entry(entry: Path, registry: Registry) -> None:
    check_task_name(entry.name)
    contents = load_soft_prompts(entry, registry.model, registry.max_virtual_tokens)
    names = names_of(entry.name, contents)
    if all(registry.is_from_inbox(name, content) for name, content in zip(names, contents, strict=True)):
        return
    published = registry.publish(entry.name, contents, "inbox")
    for task in published.tasks:
        log.info("%s: version %d from %s", task.task, task.version, entry / CONFIG_FILE)
