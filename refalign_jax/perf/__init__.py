"""Compilation for absent accelerators, measurement on those that are there."""
