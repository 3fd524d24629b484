"""Task names, and how a request writes them: `task`, or `task@version`."""

from __future__ import annotations

import bisect
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from server.errors import InvalidTaskName, UnknownTask

if TYPE_CHECKING:  # the client also imports this module, and does not load torch
    from server.soft_prompts.soft_prompt import SoftPrompt

TASK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
REACH = 50
"""Number of names before and after a misspelt name, in sorted order, to compare it with."""
MANY = 10_000
"""With more tasks than this, a misspelt name is compared with few others or none: no request sorts all names."""


def check_task_name(name: str) -> str:
    """Return the name; raises InvalidTaskName if it has other characters, is empty, or is too long."""
    if not TASK_NAME.fullmatch(name):
        raise InvalidTaskName(f"{name[:80]!r} cannot be the name of a task.")
    return name


def split_version(reference: str) -> tuple[str, int | None]:
    """Split `task@3` into task and version; raises InvalidTaskName if either is invalid."""
    name, at, version = reference.partition("@")
    if at and not _VERSION.fullmatch(version):
        raise InvalidTaskName(
            f"{reference[:80]!r} names no version.", remedy="Write task@3, with the number of a version."
        )
    return check_task_name(name), int(version) if at else None


def names_of(name: str, contents: Sequence[SoftPrompt]) -> list[str]:
    """The tasks that a publish of these contents creates; tasks of a multitask soft prompt are numbered."""
    if len(contents) == 1 and not contents[0].is_multitask_row:
        return [name]
    return [f"{name}-{row}" for row in range(len(contents))]


def unknown_task(name: str, known: Iterable[str]) -> UnknownTask:
    """The error for an unknown task, with similar names."""
    near = difflib.get_close_matches(name, _worth_comparing(name, list(known)), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    error = UnknownTask(f"There is no task {name!r}.{hint}")
    error.near = tuple(near)
    return error


def nearby(name: str, ordered: Sequence[str]) -> Sequence[str]:
    """Those of the sorted names that may be similar: all of up to MANY names, else those next to this one."""
    if len(ordered) <= MANY:
        return ordered
    at = bisect.bisect(ordered, name)
    return ordered[max(0, at - REACH) : at + REACH]


def _worth_comparing(name: str, known: list[str]) -> list[str]:
    """Names that begin or end like this one: comparing ten thousand names would block the event loop for 0.3 s."""
    if len(known) <= 2 * REACH:
        return known
    found: set[str] = set()
    for turn in (1, -1):
        ordered = sorted(other[::turn] for other in known)
        at = bisect.bisect(ordered, name[::turn])
        found.update(other[::turn] for other in ordered[max(0, at - REACH) : at + REACH])
    return sorted(found)
