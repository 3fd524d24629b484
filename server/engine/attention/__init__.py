"""Attention over the flat row: the interface that models call, and the layouts that compute it."""
