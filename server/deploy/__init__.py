"""Prelude as an application of other serving systems."""
