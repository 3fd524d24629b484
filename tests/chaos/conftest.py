"""An S3 service on loopback."""

from __future__ import annotations

from tests.registry.s3 import s3, s3_store_url

__all__ = ["s3", "s3_store_url"]
