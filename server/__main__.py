"""The command `prelude`, also as `python -m server`."""

from __future__ import annotations

from server.huge_pages import restart_with_huge_pages


def main() -> None:
    """Run the command of the process's arguments."""
    restart_with_huge_pages()
    from server.cli import app  # takes half a second, so only after the restart

    app()


if __name__ == "__main__":
    main()
