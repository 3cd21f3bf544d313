"""Requests in a JSONL file: what is read, and one sentence for every line that is not right."""

import pytest

from refalign_jax.inference.requests import read_requests


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no request"),
        ('{"prompt": 3}', "line 1: prompt is 3; it must be a string"),
        ('{"prompt": "", "size": 4}', "line 1 has the unknown field 'size'"),
        ('{"prompt": "", "references": [{"picture": "a.png"}]}', "has no field 'image'"),
        ('{"prompt": "", "id": "a/b"}', "id is 'a/b'; it must be a file's name"),
        ('{"prompt": "", "id": "a"}\n{"prompt": "", "id": "a"}', "line 2: id is 'a'; it must be a file's name that no"),
        ('{"prompt": "", "id": "' + "a" * 201 + '"}', "line 1: id has 201 bytes; at most 200 leave room"),
        ('{"prompt": "", "id": "' + "\u00e9" * 101 + '"}', "line 1: id has 202 bytes"),
        ('{"prompt": "", "id": "a\\nb"}', "line 1: id is 'a.*; it must be a file's name"),
        ('{"prompt": "", "id": ".."}', "line 1: id is '..'; it must be a file's name"),
        ('{"prompt": "", "id": "a\\u0000"}', "line 1: id is .*NUL"),
        ('{"prompt": "\\ud800"}', "line 1 holds half of a surrogate pair"),
        ('{"prompt": "", "prompt": "b"}', "line 1 is not JSON: an object has the field 'prompt' twice"),
        ("[" * 100_000, "line 1 is nested too deeply"),
        ('{"prompt": ' + "1" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_requests(path)
