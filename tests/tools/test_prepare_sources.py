"""tools/prepare.py opens2v and phantom, from the published files to steps of the trainer, and the pages on the way."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.footage import SUBJECTS, panned
from support.places import ROOT, environment
from support.published import opens2v_record, reference, write_opens2v, write_phantom, write_split_tar, write_videos

from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.overview import describe
from refalign_jax.data.sheet import show
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.video import write_video
from refalign_jax.report.dataset import write_dataset_page

SMALL = (
    *("--vae", "dct", "--text-encoder", "words", "--vfm", "daisy"),
    *("--height", "32", "--width", "48", "--num-frames", "5", "--dct-stride", "4"),
)


def prepare(*arguments):
    line = [sys.executable, str(ROOT / "tools/prepare.py"), *map(str, arguments), *SMALL]
    return subprocess.run(line, capture_output=True, text=True, env=environment(JAX_PLATFORMS="cpu"))


@pytest.fixture(scope="module")
def opens2v(tmp_path_factory):
    """A dataset of three clips out of a split tar, one of them with a video that is missing."""
    folder = tmp_path_factory.mktemp("opens2v")
    files = sorted(write_videos(folder / "files").iterdir())
    write_split_tar(folder / "tars", files)
    records = {name: opens2v_record(f"{name}.mp4") for name in SUBJECTS} | {"none": opens2v_record("none.mp4")}
    write_opens2v(folder, records)
    done = prepare("opens2v", folder / "total_part1.json", folder / "d", "--videos", folder / "tars")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_opens2v_from_the_command_line(opens2v):
    folder, done = opens2v
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["left", "out", "reason", "such", "as"]
    assert lines[1].split("  ")[-1] == f"none.mp4 is not in {folder / 'tars'}."
    assert lines[-1].startswith(
        f"3 examples are in {folder / 'd'}, 3 of them new; 1 left out (1 the video is not there;"
    )
    manifest = read_manifest(folder / "d")
    assert manifest.made["source"]["settings"]["min_area"] == 0.1
    assert "examples    3 in 1 shards" in describe(manifest)
    other = prepare(
        "opens2v", folder / "total_part1.json", folder / "d", "--videos", folder / "tars", "--min-area", 0.2
    )
    assert other.returncode == 2
    assert "was begun with min_area=0.1, not 0.2; give the same, or name another folder." in other.stderr


def test_the_page_of_a_dataset_has_clips_that_play(opens2v):
    folder, _ = opens2v
    write_dataset_page(str(folder / "d"), folder / "page.html", 2)
    text = (folder / "page.html").read_text()
    assert text.count('src="data:video/mp4;base64,') == 2
    assert text.count('alt="Reference image: ') == 4
    assert "the video is not there" in text
    assert "25.0%" in text
    assert "2 of 3 examples are shown" in text
    with pytest.raises(ValueError, match=r"name an \.html in a folder that exists"):
        write_dataset_page(str(folder / "d"), folder / "page.png", 2)


def test_phantom_from_the_command_line_and_its_sheet(tmp_path):
    vids = [f"u{n}_0_1" for n in range(3)]
    (tmp_path / "clips").mkdir()
    for vid, name in zip(vids, SUBJECTS, strict=True):
        write_video(tmp_path / "clips" / f"{vid}.mp4", panned(name), fps=8)
    rows = [
        (vids[0], "A cat.", {"cat": {"refer_result": [[reference(vids[1], [0, 0, 60, 60])]]}}),
        (vids[1], "A cup.", {"cup": {"refer_result": [[reference(vids[2], [0, 0, 200, 60])]]}}),
    ]
    annotations, metadata = write_phantom(tmp_path, rows, dict.fromkeys(vids, (96, 64)))
    places = (annotations, tmp_path / "d", "--videos", tmp_path / "clips", "--metadata", metadata)
    sheet = tmp_path / "show.png"
    done = prepare("phantom", *places, "--show", 4, "--sheet", sheet)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{sheet} shows 1 of the first 2 records.\n")
    assert "no reference is left" in done.stdout
    assert np.asarray(Image.open(sheet).convert("RGB")).std() > 20
    assert not (tmp_path / "d" / "manifest.json").exists()
    done = prepare(*places)  # the ending shows the kind
    assert done.returncode == 0, done.stderr
    assert "1 examples are in" in done.stdout


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("opens2v", ("none.json", "d", "--videos", "."), "error: none.json does not exist; expected OpenS2V"),
        ("opens2v", (".", "d", "--videos", "nowhere"), "holds no JSON file"),
        (
            "phantom",
            ("none.parquet", "d", "--videos", ".", "--metadata", "m"),
            "error: none.parquet does not exist; expected Ph",
        ),
    ],
)
def test_faults_are_one_sentence(tmp_path, monkeypatch, kind, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = prepare(kind, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    write_opens2v(tmp_path, {"a": opens2v_record()})
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys; sys.modules['pycocotools'] = None")
    line = [sys.executable, str(ROOT / "tools/prepare.py"), "opens2v", str(tmp_path / "total_part1.json"), "d"]
    paths = f"{tmp_path / 'hidden'}:{ROOT}"
    done = subprocess.run(
        [*line, "--videos", str(tmp_path), *SMALL], capture_output=True, text=True, env=environment(PYTHONPATH=paths)
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: The package pycocotools is not installed; install what real data needs: pip install -e '.[data]'.\n"
    )


def test_a_sheet_of_nothing_is_refused(tmp_path):
    from support.published import TINY

    (tmp_path / "r.jsonl").write_text('{"video": "none.mp4", "prompt": "", "references": []}')
    with pytest.raises(ValueError, match=r"None of the first 1 records can be used\. The first: .*none\.mp4 does not"):
        show(read_jsonl(tmp_path / "r.jsonl"), TINY, 2, tmp_path / "s.png")
    with pytest.raises(ValueError, match=r"is no PNG in a folder that exists"):
        show([], TINY, 2, tmp_path / "s.jpg")
    assert not (tmp_path / "s.png").exists()
