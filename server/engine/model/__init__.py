"""The frozen model: loading, refusing what cannot be served exactly, and the forward."""
