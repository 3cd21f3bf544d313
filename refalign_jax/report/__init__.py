"""The report of a run, one HTML page: its recipe, losses, samples, and the structure of its reference tokens."""
