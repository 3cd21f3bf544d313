"""Checks that several configurations share; each raises a ValueError that names class, field and value."""

from __future__ import annotations


def check_positive(config: object, name: str) -> None:
    """Raises ValueError unless a number is above 0."""
    value = getattr(config, name)
    if not value > 0:
        raise ValueError(f"{type(config).__name__}.{name}={value} must be positive.")


def check_choice(config: object, name: str, choices: object) -> None:
    """Raises ValueError unless a value is one of a Literal's."""
    value, allowed = getattr(config, name), choices.__args__  # type: ignore[attr-defined]
    if value not in allowed:
        raise ValueError(f"{type(config).__name__}.{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")


def check_least(config: object, least: int, *names: str) -> None:
    """Raises ValueError unless numbers are at least `least`."""
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)} must be at least {least}.")
