"""OpenS2V-Eval: scores of generated videos, and the table that they add up to."""
