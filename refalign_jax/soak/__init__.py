"""Soak tests: kills, simultaneous starts and flipped bits by the hundred; run by tools/soak.py."""
