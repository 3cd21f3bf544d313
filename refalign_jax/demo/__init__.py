"""The demo: a small model is trained on moving photographs on a CPU, sampled and scored."""
