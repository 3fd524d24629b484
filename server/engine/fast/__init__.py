"""Optimisations that make a loaded model faster without changing its results."""
