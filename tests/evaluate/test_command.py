"""The command prints the table and names what is wrong."""

import json

import pytest

from refalign_jax.command import load
from refalign_jax.locks import exclusive

FILES = {"gmescore": {"a": {"gme_score": 0.7}}, "naturalscore_1": {"a": "4"}}


@pytest.fixture
def folder(tmp_path):
    for name, entries in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


def test_the_table_is_printed_and_written(folder, capsys):
    load("evaluate")(
        [str(folder), "--name", "mine", "--json", str(folder / "out.js"), "--markdown", str(folder / "out.md")],
        "evaluate",
    )
    printed = capsys.readouterr().out
    assert "No total: Aesthetic (aesthetic_score), Smoothness" in printed
    report = json.loads((folder / "out.js").read_text())
    assert report["metrics"]["Gme"] == {"percent": pytest.approx(70), "videos": 1, "without_value": []}
    assert report["total"] is None
    assert "| mine | missing |" in (folder / "out.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clip", "c"], "--clip and --aesthetic-head belong together"),
        (["--face-model", "c"], "--faces and --face-model belong together"),
        (["--clip", "c", "--aesthetic-head", "h"], "name their folder by --videos"),
        (["--prompts", "none.json"], "none.json can't be read"),
        (["--faces", "none", "--face-model", "m"], "has no folders of faces"),
    ],
)
def test_wrong_arguments_are_one_sentence(folder, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load("evaluate")([str(folder), *arguments], "evaluate")


def test_a_folder_of_scores_has_one_writer(folder):
    pytest.importorskip("cv2")
    (folder / "a.mp4").touch()
    with exclusive(folder, "another"), pytest.raises(ValueError, match="is in use"):
        load("evaluate")([str(folder), "--videos", str(folder)], "evaluate")
