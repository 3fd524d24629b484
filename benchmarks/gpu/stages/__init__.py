"""The stages, one module each; a module has `measure(run)` and imports only what it needs."""
