"""From text to tokens and back, without the model."""
