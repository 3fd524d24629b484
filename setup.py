"""Builds the playground before Prelude is packed; all else is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
PAGE = ROOT / "server/web/dist/index.html"


def build_page() -> None:
    """Build the page, unless it came built: in a source distribution, or, without web/, from the Dockerfile's stage."""
    if (ROOT / "web").exists() and not (ROOT / "PKG-INFO").exists():
        subprocess.run([sys.executable, str(ROOT / "web/npm.py"), "build"], check=True)
    if not PAGE.exists():
        raise FileNotFoundError(f"{PAGE} is missing: build it with `python web/npm.py build`, which needs Node.js")


class BuildPy(build_py):
    """Builds the page into the package; an installation in place takes what `make run` builds."""

    def run(self) -> None:
        """Build all."""
        if not self.editable_mode:
            build_page()
        super().run()


class Sdist(sdist):
    """A source distribution with the page in it, so that nobody needs Node.js to install it."""

    def run(self) -> None:
        """Pack all."""
        build_page()
        super().run()


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
