"""Checks that several configurations share; each raises a ValueError that names class, field and value."""

from __future__ import annotations


def check_positive(config: object, name: str) -> None:
    value = getattr(config, name)
    if not value > 0:
        raise ValueError(f"{type(config).__name__}.{name}={value} must be positive.")


def check_choice(config: object, name: str, choices: object) -> None:
    value, allowed = getattr(config, name), choices.__args__  # type: ignore[attr-defined]
    if value not in allowed:
        raise ValueError(f"{type(config).__name__}.{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")


def check_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{type(config).__name__}.{name}={getattr(config, name)} must be at least {least}.")
