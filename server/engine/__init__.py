"""The core: one frozen model, continuous batching, soft prompts of any task in one forward."""
