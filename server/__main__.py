"""The command `prelude`, also as `python -m server`."""

from __future__ import annotations

import os
import signal

from server.huge_pages import restart_with_huge_pages


def main() -> None:
    """Run the command of the process's arguments."""
    restart_with_huge_pages()
    end_on_sigterm()
    from server.cli import app  # takes half a second, so only after the restart

    app()


def end_on_sigterm() -> None:
    """Let SIGTERM end process 1 of a container until the server handles it: Linux drops it otherwise."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    main()
