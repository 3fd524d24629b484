"""OpenAI's words for what this server does: a translation, of which the engine knows nothing."""
