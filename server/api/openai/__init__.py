"""OpenAI's API, as a translation that the engine does not know."""
