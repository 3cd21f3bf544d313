"""JSON files and JSONL files, one JSON object per line, and checks of their fields; each fault is one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refalign_jax.data.files import check_file


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the number, from 1, and the value of each line of a JSONL file; empty lines are skipped.

    Raises:
      ValueError: no such file, one that is no regular file, or a line that is not JSON.
    """
    check_file(path, "a JSONL file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would also cut at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as UTF-8 text: {getattr(error, 'strerror', None) or error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_unique)
            json.dumps(value, ensure_ascii=False).encode()
        except RecursionError as error:
            raise ValueError(f"{path}, line {number} is nested too deeply.") from error
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}, line {number} holds half of a surrogate pair, which is no character.") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        yield number, value


def read_json(path: Path) -> Any:
    """Reads a JSON file; half of a surrogate pair, which no file can hold, becomes a question mark.

    Raises:
      ValueError: it can't be read, or is not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply.") from error
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its fields; one of them would be lost where two have one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the field {max(names, key=names.count)!r} twice")
    return found


def check_fields(value: Any, known: Mapping[str, bool], where: str) -> None:
    """Checks that a value is an object with all required fields and no unknown ones.

    Args:
      value: the value.
      known: the fields' names, and whether each is required.
      where: file and line, for the message.

    Raises:
      ValueError: it is not.
    """
    form = "{" + ", ".join(f'"{name}"' + ("" if needed else "?") for name, needed in known.items()) + "}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.60}; it must be an object {form}.")
    missing = [name for name, needed in known.items() if needed and name not in value]
    unknown = [name for name in value if name not in known]
    if missing:
        raise ValueError(f"{where} has no field {missing[0]!r}; it must be {form}.")
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; it must be {form}.")


def check_text(value: Any, name: str, where: str, empty: bool = False) -> None:
    """Checks that a field is a string.

    Args:
      value: the field's value.
      name: the field's name, for the message.
      where: file and line, for the message.
      empty: whether the empty string is allowed.

    Raises:
      ValueError: it is not.
    """
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must not hold the character NUL.")
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must be a string{'' if empty else ' and not empty'}.")
