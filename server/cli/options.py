"""Options of `prelude serve` made of the settings themselves, so that the two can never differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from server.settings import ENV_PREFIX, Settings


def _help(name: str, field: FieldInfo) -> str:
    """A setting's description, its variable and its default; in parentheses, as square brackets are markup."""
    default = field.get_default()
    shown = f"; default: {default.human_readable() if isinstance(default, ByteSize) else default}"
    return f"{field.description} (env: {ENV_PREFIX}{name.upper()}{'' if default is None else shown})"


def with_settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**options` one option per setting; those that are not given are None."""
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    f"--{name.replace('_', '-')}",
                    help=_help(name, field),
                    show_default=False,
                ),
            ],
        )
        for name, field in Settings.model_fields.items()
    ]

    def run(**options: Any) -> None:
        command(**options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
