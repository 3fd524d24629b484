"""Limits of the bodies that tests send."""

from __future__ import annotations

HUGE, MEMORY, DISK = 200 * 2**20, 2**30, 2**31
