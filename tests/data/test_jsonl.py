"""The JSONL source: what is read, and one sentence for every line that is not right."""

import json
import os

import pytest

from refalign_jax.data.sources.jsonl import read_jsonl

GOOD = {
    "video": "clips/cat.mp4",
    "prompt": "A cat.",
    "references": [
        {"image": "a.png"},
        {"image": "/abs/b.png", "subject": "cat", "mask": "b_mask.png"},
        {"image": "c.png", "subject": "cat"},
    ],
}


def written(tmp_path, *lines):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_paths_are_relative_to_the_file(tmp_path):
    (record,) = read_jsonl(written(tmp_path, GOOD, "  "))
    assert record.video == tmp_path / "clips" / "cat.mp4"
    assert record.prompt == "A cat."
    assert [str(reference.path) for reference in record.references] == [
        str(tmp_path / "a.png"),
        "/abs/b.png",
        str(tmp_path / "c.png"),
    ]
    assert [reference.mask for reference in record.references] == [None, tmp_path / "b_mask.png", None]
    assert not any(reference.own_clip for reference in record.references)
    assert record.metadata == {"video": "clips/cat.mp4", "references": GOOD["references"]}


def test_ids_are_the_names_with_a_hash_and_do_not_depend_on_place(tmp_path):
    other = GOOD | {"prompt": "Another."}
    first, second = read_jsonl(written(tmp_path, GOOD, other))
    again = read_jsonl(written(tmp_path, other, dict(reversed(GOOD.items()))))
    assert [record.id for record in again] == [second.id, first.id]
    assert first.id.startswith("cat-")
    assert first.id != second.id


FORM = r'it must be \{"video", "prompt", "references"\}\.$'
REFERENCE_FORM = r'it must be \{"image", "subject"\?, "mask"\?\}\.$'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"records\.jsonl, line 2 is not JSON: Expecting property name"),
        ("[]", r"line 2 is \[\]; it must be an object"),
        ({"video": "a", "prompt": "b"}, rf"line 2 has no field 'references'; {FORM}"),
        (GOOD | {"promt": "b"}, rf"line 2 has the unknown field 'promt'; {FORM}"),
        (GOOD | {"video": 3}, r"line 2: video is 3; it must be a string and not empty\.$"),
        (GOOD | {"video": ""}, r"line 2: video is ''; it must be a string and not empty\.$"),
        (GOOD | {"prompt": None}, r"line 2: prompt is None; it must be a string\.$"),
        (GOOD | {"references": {}}, r"line 2: references is \{\}; it must be a list, \[\] for none\.$"),
        (GOOD | {"references": ["a.png"]}, r"line 2: references\[0\] is 'a.png'; it must be an object"),
        (GOOD | {"references": [{"mask": "a"}]}, rf"line 2: references\[0\] has no field 'image'; {REFERENCE_FORM}"),
        (
            GOOD | {"references": [{"image": "a"}, {"image": "b", "box": 1}]},
            rf"line 2: references\[1\] has the unknown field 'box'; {REFERENCE_FORM}",
        ),
        (
            GOOD | {"references": [{"image": "a", "subject": 1}]},
            r"line 2: references\[0\]\.subject is 1; it must be a string and not empty\.$",
        ),
        (GOOD, r"records\.jsonl, line 2 says the same as line 1; remove one of them\.$"),
    ],
)
def test_a_line_that_is_not_right_is_told_in_a_sentence(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(written(tmp_path, GOOD, line))
    assert "\n" not in str(error.value)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist; expected a JSONL file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.jsonl can't be read as UTF-8 text: .*invalid"):
        read_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match=r'holds no record; a line is \{"video"'):
        read_jsonl(written(tmp_path, ""))


def test_text_may_hold_unusual_line_separators(tmp_path):
    line = json.dumps(GOOD | {"prompt": "A\u2028cat\x85."}, ensure_ascii=False)
    (record,) = read_jsonl(written(tmp_path, line))
    assert record.prompt == "A\u2028cat\x85."


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is a FIFO, a socket or a device; expected a JSONL file\."):
        read_jsonl(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r" is a folder; expected a JSONL file\."):
        read_jsonl(tmp_path)
