"""The variables that Ray's processes must be started with; see `ray_proxy.py`."""

import os

from server.huge_pages import ask_for_huge_pages

PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.deploy.ray_proxy:middleware"}
"""Lets Ray's HTTP proxies run Prelude's middleware. A cluster that runs already must have been started with it."""


def prepare() -> None:
    """Set the variables, unless the user has; Ray's processes inherit them when this process starts Ray."""
    ask_for_huge_pages()
    for name, value in PROXY.items():
        os.environ.setdefault(name, value)
