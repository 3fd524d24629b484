"""What a soft prompt is: an immutable value, its validation, and PEFT's files in and out."""
