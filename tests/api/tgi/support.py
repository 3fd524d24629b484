"""What tests of text-generation-inference's routes share."""

from __future__ import annotations

ROUTES = ("/generate", "/generate_stream", "/")
