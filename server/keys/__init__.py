"""API keys and their rights."""
