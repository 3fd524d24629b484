"""The core: one frozen model and continuous batching; one forward serves the soft prompts of any tasks."""
