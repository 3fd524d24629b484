"""Tasks and their versions over HTTP."""
