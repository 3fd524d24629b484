"""Finds soft prompts for commands: in the inbox, as a server would serve them, in the store, or on a server."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt, UnknownTask
from server.registry.inbox import Inbox
from server.registry.objects import LocalObjects, open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.names import names_of, split_version, unknown_task
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

MOST_NAMED = 20
"""Tasks of the inbox that an error lists."""

Named = tuple[str, SoftPrompt]


@dataclass(frozen=True)
class Found:
    """The evaluated soft prompt, and the versions that it is compared with."""

    name: str
    version: int | None
    soft_prompt: SoftPrompt
    others: tuple[Named, ...] = ()


def find(
    settings: Settings,
    model: ModelSpec,
    reference: str,
    directory: Path | None,
    compare: tuple[int, int] | None,
    others: Sequence[int],
) -> Found:
    """Find the soft prompts of an evaluation.

    Args:
        reference: a task in the inbox, or `task@version` in the store.
        directory: a PEFT directory, instead of the inbox's.
        compare: two versions in the store, the second of which is evaluated.
    """
    task, version = split_version(reference)
    if compare is not None:
        if version is not None:
            raise UnknownTask(f"{reference} names a version, and so does --compare.", remedy=f"Name the task: {task}.")
        version, others = compare[1], [compare[0], *others]
    numbers = [number for number in dict.fromkeys(others) if number != version]
    stored = _stored(settings, model, task, [*([] if version is None else [version]), *numbers])
    named = tuple((f"{task}@{number}", stored[number]) for number in numbers)
    if version is not None:
        return Found(f"{task}@{version}", version, stored[version], named)
    return Found(task, None, _of_inbox(settings, model, task, directory), named)


def check_reference(settings: Settings, reference: str) -> None:
    """Refuse (InvalidTaskName, UnknownTask) a reference that `find` cannot find, before a model is loaded."""
    task, version = split_version(reference)
    if version is not None:
        _check_store(settings)
        return
    try:
        entries = sorted(path.name for path in settings.prompts_dir.iterdir() if not path.name.startswith("."))
    except OSError:
        entries = []
    # The rows of a multitask soft prompt `many` are many-0, many-1, ….
    if not {task, task.rpartition("-")[0]} & set(entries):
        raise _unknown(settings, unknown_task(task, entries), entries)


def _unknown(settings: Settings, error: UnknownTask, tasks: Sequence[str]) -> UnknownTask:
    """The error with a remedy that says what the inbox holds."""
    holds = ", ".join(tasks[:MOST_NAMED]) or "nothing"
    more = f" and {len(tasks) - MOST_NAMED:,} more" if len(tasks) > MOST_NAMED else ""
    return UnknownTask(
        error.message,
        remedy=f"The inbox {settings.prompts_dir} holds {holds}{more}; PRELUDE_PROMPTS_DIR names another inbox.",
    )


def pulled(settings: Settings, model: ModelSpec, reference: str, url: str, key: str | None) -> Named:
    """A version of a running server, the only live one unless the reference names another, as `task@version`."""
    from server.cli.references import download, only_live
    from server.cli.remote import connected

    task, number = split_version(reference)
    with tempfile.TemporaryDirectory(prefix="prelude-pulled-") as folder:
        with connected(url, key) as client:
            version = only_live(client.versions(task)) if number is None else number
            download(client, task, version, Path(folder))
        return f"{task}@{version}", load_soft_prompts(Path(folder), model, settings.max_virtual_tokens)[0]


def _stored(settings: Settings, model: ModelSpec, task: str, versions: Sequence[int]) -> dict[int, SoftPrompt]:
    """Read versions of a task from the store, without writing to it."""
    if not versions:
        return {}
    _check_store(settings)
    registry = Registry(Store(open_objects(settings.store_url)), model, settings.max_virtual_tokens)
    return {number: registry.fetch(registry.resolve(f"{task}@{number}")).result() for number in versions}


def _check_store(settings: Settings) -> None:
    """Refuse a folder that does not exist as a store; opening it would create it."""
    scheme, _, path = settings.store_url.partition(":")
    if scheme == "file" and not Path(path.removeprefix("//")).expanduser().is_dir():
        raise UnknownTask(
            f"There is no store at {settings.store_url}, so there are no versions.",
            remedy="A server that ran here has made one; PRELUDE_STORE names it. Without @ and a number, the soft "
            "prompt of the inbox is used.",
        )


def _of_inbox(settings: Settings, model: ModelSpec, task: str, directory: Path | None) -> SoftPrompt:
    """The soft prompt with which a server with this inbox would answer `task`, or the one in a directory.

    It is published like on a server, but to a temporary store.
    """
    with tempfile.TemporaryDirectory(prefix="prelude-eval-") as store:
        registry = Registry(Store(LocalObjects(Path(store))), model, settings.max_virtual_tokens)
        if directory is not None:
            if not directory.is_dir():
                raise InvalidSoftPrompt(f"There is no directory {directory}.", remedy="Name a PEFT directory.")
            contents = load_soft_prompts(directory, model, settings.max_virtual_tokens)
            for note in contents[0].notes:
                log.warning("%s: %s", directory, note)
            if names_of(task, contents) != [task]:
                raise InvalidSoftPrompt(
                    f"{directory} is a multitask soft prompt with {len(contents)} rows.",
                    remedy=f"Put it into {settings.prompts_dir}; there they are {directory.name}-0, ….",
                )
            registry.publish(task, contents, "inbox")
        else:
            Inbox(settings.prompts_dir, registry).scan(settle_seconds=0)
        try:
            return registry.fetch(registry.resolve(task)).result()
        except UnknownTask as exc:
            if task in registry.errors:
                raise InvalidSoftPrompt(
                    f"{settings.prompts_dir / task} cannot be served.", remedy=registry.errors[task]
                ) from exc
            raise _unknown(settings, exc, [live.name for live in registry.tasks()]) from exc
