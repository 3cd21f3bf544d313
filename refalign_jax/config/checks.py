"""Checks that all configurations share; each raises a ValueError that names class, field, value and what is allowed."""

from __future__ import annotations

import dataclasses
import numbers
import os
import sys
import types
import typing
from typing import Any, Literal


def check_values(config: Any) -> None:
    """Checks every field against its annotation; those that are paths are not checked.

    Whole numbers, finite numbers, switches, text, choices, tuples of these, and configurations are.

    Raises:
      ValueError: a value that its annotation does not allow, or a number that is NaN or infinite.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        wrong = _wrong(hint, value)
        if wrong:
            raise ValueError(f"{type(config).__name__}.{name}={value!r} {wrong}.")


def check_range(
    config: Any,
    *names: str,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Checks that numbers, or every number of a tuple, lie in a range; None, an unset field, passes.

    Raises:
      ValueError: a number outside the range.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (
                (above is None or number > above)
                and (least is None or number >= least)
                and (most is None or number <= most)
                and (below is None or number < below)
            ):
                allowed = _range(above, least, most, below)
                raise ValueError(f"{type(config).__name__}.{name}={value} must be {allowed}.")


def expand_home(config: Any, *names: str) -> None:
    """Replaces ~ at the start of fields that hold paths by the home folder; None, an unset field, stays."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, os.path.expanduser(value))  # the class is frozen


def check_num_frames(config: Any) -> None:
    """Raises ValueError unless `num_frames` is 4k+1, which the VAE needs; None, an unset field, passes."""
    frames = config.num_frames
    if frames is not None and frames % 4 != 1:
        raise ValueError(
            f"{type(config).__name__}.num_frames={frames} must be 4k+1, such as {max(frames, 0) // 4 * 4 + 1}."
        )


def _range(above: float | None, least: float | None, most: float | None, below: float | None) -> str:
    """A range in words."""
    if (above, least, most, below) == (0, None, None, None):
        return "positive"
    words = {"above": above, "at least": least, "at most": most, "below": below}
    powers: dict[float, str] = {2**31: "2^31", 2**32: "2^32"}
    return " and ".join(f"{word} {powers.get(bound, bound)}" for word, bound in words.items() if bound is not None)


def _wrong(hint: Any, value: Any) -> str:
    """What a value must be, where its annotation does not allow it; empty where it does."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        reasons = [_wrong(option, value) for option in options]
        return "" if "" in reasons else reasons[0]
    if typing.get_origin(hint) is Literal:
        return "" if value in options else f"is unknown; choose one of {', '.join(map(str, options))}"
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        each = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(each) != len(value):
            return f"must hold {len(each)} values"
        return next(filter(None, map(_wrong, each, value)), "")
    if typing.get_origin(hint) is tuple:
        return "must be a tuple"
    if hint is type(None):
        return "" if value is None else "must be unset"
    if hint is str and not isinstance(value, str):
        return "must be text"
    if hint is bool and not isinstance(value, bool):
        return "must be true or false"
    if dataclasses.is_dataclass(hint) and not isinstance(value, typing.cast(type, hint)):
        return f"must be a {getattr(hint, '__name__', hint)}"
    if hint is int and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
        return "must be a whole number"
    if hint is float and not isinstance(value, numbers.Real):
        return "must be a number"
    if hint is float and not abs(value) <= sys.float_info.max:  # a whole number may be too large for a float
        return "is not finite"
    return ""
