"""The edge: HTTP in, HTTP out. Nothing here imports torch; nothing behind it knows of HTTP."""
