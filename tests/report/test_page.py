"""The page as a whole: what is there, what is left out, and that a browser shows it."""

import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image
from support import chromium
from support.places import ROOT, environment
from support.reported import recipe, write_run

from refalign_jax.report import page
from refalign_jax.report.content import Section

TOOL = ROOT / "tools" / "report.py"


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """The report of a run that has everything, with two pairs."""
    out = tmp_path_factory.mktemp("page") / "all.html"
    pairs = [(runs["a0"], runs["b0"]), (runs["a1"], runs["b1"])]
    page.write_report(runs["a0"], out, {"With and without alignment": pairs, "Once more": pairs[1:]})
    return out


def text_of(path):
    return re.sub(r"<[^>]*>", " ", path.read_text(encoding="utf-8"))


def test_everything_is_there_and_nothing_comes_from_elsewhere(report):
    source = report.read_text(encoding="utf-8")
    assert re.findall(r'href="#([^"]*)"', source) == [
        "samples",
        "evaluation",
        "comparison-0",
        "comparison-1",
        "tokens",
        "targets",
        "losses",
        "set-up",
    ]
    assert set(re.findall(r'(?:src|href|srcset)="([^"#]{5})', source)) == {"data:"}
    assert "http" not in re.sub(r"base64,[^\"]*", "", source)
    shown = text_of(report)
    for part in (
        "A demo of three subjects",
        "What this is, in a sentence.",
        "Each row: the references of a sample",
        "40 of 40",
        "1,234",
        "A &lt;rocket&gt; &amp; more.",
        "Several subjects",
        "0.875",
        "48 reference tokens of 3 subjects, out of 8 held-out examples",
        "Nearest-neighbour subject accuracy is ",
        "Means of 4 examples of two subjects or more",
        "seed 1",
        "Not every run of the pairs has an evaluation.json",
    ):
        assert part in shown, part
    assert source.count("<video") == source.count(" loop muted playsinline") == 5
    assert " controls" not in source
    assert shown.index("What this is") < shown.index("Each row") < shown.index("A note.") < shown.index("40 of 40")
    assert not re.search(r"<img(?![^>]* alt=\"[^\"]+\")", source)


def test_every_chart_is_a_file_too(report):
    files = sorted(report.with_name("all_figures").iterdir())
    names = {file.stem for file in files}
    assert {"loss_loss", "loss_pull", "map_pca_before_training", "map_tsne_of_the_vfm", "blocks_cka"} <= names
    assert {
        "compare_cka",
        "blocks_compare_neighbour",
        "blocks_compare_1_neighbour",
        "map_tsne_compare_with_alignment",
        "map_pca_compare_lambda_0",
    } <= names
    assert len(files) == report.read_text(encoding="utf-8").count('class="chart"')
    for file in files:
        assert np.asarray(Image.open(file).convert("L")).std() > 5, file


def test_what_a_run_lacks_is_left_out_with_a_sentence(tmp_path, trained):
    folder = write_run(recipe(tmp_path / "run", "", weight=0.0), trained)
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "previews").mkdir()
    for step in (20, 40):
        Image.new("RGB", (40, 20)).save(folder / "previews" / f"step-{step:08d}.png")
    done = subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == f"The report is {folder / 'report.html'}.\n"
    shown = text_of(folder / "report.html")
    for part in (
        "without reference alignment (λ = 0)",
        "there are no losses to draw",
        "has no sampled videos",
        "has no evaluation.json",
        "The reference tokens are left out: The run was trained on synthetic noise, which shows no subjects.",
        "The newest preview of training, step-00000040",
    ):
        assert part in shown, part
    assert not (folder / "report_figures").exists()


def test_no_run_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* is no run's folder: [^\n]*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_bad_output_and_failures_leave_nothing_half_written(runs, tmp_path, monkeypatch):
    for out in (tmp_path / "report.pdf", tmp_path / "none" / "report.html"):
        with pytest.raises(ValueError, match=r"name an \.html file in a folder that exists"):
            page.write_report(runs["b0"], out)
    out = tmp_path / "report.html"
    out.write_text("before")
    monkeypatch.setattr(page, "tokens_section", lambda _: Section(html=Markup()))
    monkeypatch.setattr(page, "render", lambda *_, **__: "\ud800")  # which UTF-8 can't encode
    with pytest.raises(UnicodeEncodeError):
        page.write_report(runs["b0"], out)
    assert out.read_text() == "before"


OVERFLOWING = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll")
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


SCROLLING = """[...document.querySelectorAll(".scroll")].filter(e => !e.closest("details")
  && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


DARK_CHARTS = """[...document.querySelectorAll("picture")].map(
  p => p.querySelector("img").currentSrc == p.querySelector("source").srcset)"""


@pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_on_a_desktop_and_a_phone(report):
    with chromium.page() as tab:
        for width, dark in itertools.product((1280, 390), (False, True)):
            tab.show(report, width, dark=dark)
            charts = tab.evaluate("[...document.images].map(i => i.naturalWidth)")
            assert len(charts) > 20
            assert min(charts) > 0
            videos = tab.evaluate("[...document.querySelectorAll('video')].map(v => [v.readyState, v.videoWidth])")
            assert len(videos) == 5
            assert min(videos) >= [1, 32]
            assert tab.evaluate("document.documentElement.clientWidth") >= width - 20  # a scroll bar
            assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
            assert tab.evaluate(OVERFLOWING) == []
            assert tab.evaluate(SCROLLING) == []
            background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
            assert set(tab.evaluate(DARK_CHARTS)) == {dark}
        tab.wait_for("[...document.querySelectorAll('video')].every(v => v.currentTime > 0 && v.muted && v.loop)")
        assert not tab.evaluate("[...document.querySelectorAll('video')].some(v => v.controls || v.paused)")
        tab.evaluate("document.querySelector('button.play').click()")
        assert tab.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
        tab.evaluate("document.querySelector('button.play').click()")
        tab.wait_for("[...document.querySelectorAll('video')].every(v => !v.paused)")
        assert tab.complaints == []


@pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium on this machine")
def test_the_browser_would_complain(tmp_path):
    """The test above can fail: errors on the console and pages that are too wide are seen."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width"><p style="width:600px">x</p><script>fail()</script>'
    )
    with chromium.page() as tab:
        tab.show(bad, 390)
        assert tab.evaluate("document.documentElement.scrollWidth") > 390
        assert any("fail is not defined" in complaint for complaint in tab.complaints)
