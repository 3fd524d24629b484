"""The edge: HTTP in, HTTP out. Nothing here imports torch, and no other part knows HTTP."""
