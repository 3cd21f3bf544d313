"""Damages files at random: values of other types, sizes and depths in JSON, bytes flipped, cut, inserted, left out."""

import copy
import json

VALUES = (None, True, 0, -1, 1, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800", "$_{")
VALUES += ("../../x", "~", "x" * 5000, [], [[]], [1], ["a", 2], {}, {"a": {}}, {"": None}, [None] * 50)


def places(value, path=()):
    """Paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def damaged_json(value, rng):
    """The value with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(value)))
        if not path:
            return copy.deepcopy(rng.choice(VALUES))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = rng.random()
        if how < 0.2:
            del holder[path[-1]]
        elif how < 0.3 and isinstance(holder, dict):
            holder[rng.choice(("unknown", "", path[-1] + "x"))] = copy.deepcopy(rng.choice(VALUES))
        elif how < 0.35 and isinstance(holder, list):
            holder.append(copy.deepcopy(rng.choice(VALUES)))
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return value


def damaged_bytes(content, rng):
    """The bytes cut, flipped, doubled or replaced at random."""
    at = rng.randrange(len(content) or 1)
    how = rng.randrange(7)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[at + rng.randrange(1, 20) :]
    if how == 2:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if how == 3:
        return content + content[at:]
    if how == 4:
        return rng.choice((b"", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b'{"a":' * 50_000, b"\n\n", content[::-1]))
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 8)) if content else 0):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def damaged(content, rng):
    """A JSON or JSONL file's text, or other bytes, damaged."""
    if rng.random() < 0.3:
        return damaged_bytes(content, rng)
    try:
        return json.dumps(damaged_json(json.loads(content), rng)).encode()
    except ValueError:
        pass
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
    except ValueError:
        return damaged_bytes(content, rng)
    number = rng.randrange(len(lines))
    lines[number] = damaged_json(lines[number], rng)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
