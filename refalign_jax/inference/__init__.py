"""Prompts and reference images to videos."""
