"""The front end of text-generation-inference: /generate, /generate_stream, /info."""
