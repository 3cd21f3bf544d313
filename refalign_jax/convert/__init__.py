"""Published weights to our parameters and back: one table per model, strict and lossless."""
