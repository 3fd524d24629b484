"""The soft prompt: an immutable value, its validation, and reading and writing PEFT's files."""
