"""The command `prelude`."""

from server.cli.main import app

__all__ = ["app"]
