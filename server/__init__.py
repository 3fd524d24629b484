"""Prelude: one frozen LLM in memory, any number of tasks, each a soft prompt."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prelude-server")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"
