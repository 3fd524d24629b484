"""Creates commands' options from a class; those of `prelude serve` from the settings, so that the two cannot differ."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from server.settings import ENV_PREFIX, Settings

Options = TypeVar("Options")


def _help(name: str, field: FieldInfo) -> str:
    """A setting's description, variable and default; in parentheses, because square brackets are markup."""
    default = field.get_default()
    shown = f"; default: {default.human_readable() if isinstance(default, ByteSize) else default}"
    return f"{field.description} (env: {ENV_PREFIX}{name.upper()}{'' if default is None else shown})"


def with_settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**options` one option per setting; options that are not given are None."""
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None, typer.Option(f"--{name.replace('_', '-')}", help=_help(name, field), show_default=False)
            ],
        )
        for name, field in Settings.model_fields.items()
    ]

    return _with_signature(command, parameters)


def with_options_of(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Give a command one option per field of a dataclass; the command receives one instance of it."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
    ]

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        run = _with_signature(lambda **given: command(options(**given)), parameters)
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _with_signature(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """A wrapper of a command with these parameters in its signature, for typer."""

    def run(**given: Any) -> None:
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
