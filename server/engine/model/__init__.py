"""The frozen model: loading it, refusing models that cannot be served exactly, and the forward."""
