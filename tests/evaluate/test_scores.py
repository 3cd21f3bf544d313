"""Score files add up to the published totals; what is missing or malformed is named."""

import json
import math

import pytest

from refalign_jax.evaluate import table
from refalign_jax.evaluate.scores import METRICS, Score, metrics_of, read_scores, total

FILES = {
    "aesthetic_score": {"a": {"aes_score": 4.9}, "b": {"aes_score": 8.0}, "c": {"aes_score": 3.0}},
    "motion_smoothness": {"a": {"motion_smoothness": 0.9}, "b": {"motion_smoothness": 1.0}},
    "motion_amplitude": {"a": {"motion_fb": 0.2, "motion_lk": 9.0}, "b": {"motion_fb": 7.0}},
    "facesim": {"b": {"cur_score": 0.5, "arc_score": 0.1}},
    "gmescore": {"a": {"gme_score": 0.7}, "b": {"gme_score": 0.6}},
    "nexusscore": {"a": {"nexus_score": 0.01}, "b": {"nexus_score": 0.0}, "c": {"nexus_score": 0.2}},
    "naturalscore_1": {"a": "4", "b": "error"},
    "naturalscore_2": {"a": "5", "b": "2"},
    "naturalscore_3": {"a": "3", "b": "9"},
}
PERCENT = {
    "Aesthetic": 100 * (0.3 + 1 + 0) / 3,
    "Smoothness": 95.0,
    "Amplitude": 60.0,
    "FaceSim": 50.0,
    "Gme": 65.0,
    "Nexus": 100 * (0.2 + 1) / 2,
    "Natural": 100 * (0.75 + (5 - 1) / 4 * 1.0) / 2,
}
"""By hand; b's judgements are 2 and 9, whose mean, 5.5, is clamped to 5."""


@pytest.fixture
def folder(tmp_path):
    for name, entries in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "published"),
    [("RefAlign-14B", 60.42), ("RefAlign-1.3B", 56.30), ("VINO", 57.85), ("VACE-14B", 57.55), ("Phantom-14B", 56.77)],
)
def test_the_leaderboard_adds_up(model, published):
    assert total(table.PUBLISHED[model], "open") == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("domain", ["open", "single", "human"])
def test_weights_add_up_to_one(domain):
    assert math.fsum(metric.weights[domain] for metric in metrics_of(domain)) == pytest.approx(1)
    assert len(metrics_of(domain)) == (6 if domain == "human" else 7)


def test_values_are_normalised_and_averaged_over_the_videos_that_have_them(folder):
    scores = read_scores(folder, "open")
    assert {name: score.percent for name, score in scores.items()} == pytest.approx(PERCENT)
    assert scores["Nexus"] == Score(percent=pytest.approx(60.0), videos=2, skipped=("b",))
    assert scores["FaceSim"].videos == 1
    weighted = {m.name: m.weights["open"] * PERCENT[m.name] for m in METRICS}
    assert total(PERCENT, "open") == pytest.approx(sum(weighted.values()))
    assert read_scores(folder, "open", ids=["a"])["Natural"].percent == pytest.approx(75)


def test_a_judge_that_never_gives_a_number_leaves_the_video_out(folder):
    for run in (1, 2, 3):
        (folder / f"naturalscore_{run}.json").write_text(json.dumps({"a": "error", "b": "4"}))
    score = read_scores(folder, "open")["Natural"]
    assert (score.percent, score.videos, score.skipped) == (75, 1, ("a",))
    assert "Natural: 1 videos have no value that counts (a)." in table.notes({"Natural": score} | _rest(folder), "open")


def _rest(folder):
    return {name: score for name, score in read_scores(folder, "open").items() if name != "Natural"}


def test_a_missing_metric_is_named_and_there_is_no_total(folder):
    (folder / "gmescore.json").unlink()
    scores = read_scores(folder, "open")
    assert scores["Gme"].percent is None
    printed = table.text("mine", scores, "open")
    assert "No total: Gme (gmescore) missing. A missing metric does not count as zero." in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("mine")]
    assert row.split()[1] == "missing"
    assert table.report("mine", scores, "open")["total"] is None
    assert total({"Gme": None}, "open") is None


def test_the_table_has_published_rows_the_spread_and_copy_paste(folder):
    scores = read_scores(folder, "open")
    printed, page = table.text("mine", scores, "open"), table.markdown("my|model", scores, "open")
    for row in table.PUBLISHED:
        assert row in printed
        assert row in page
    assert "56.77" in printed
    assert "60.43" in printed
    assert "my\\|model" in page
    (row,) = [line for line in printed.splitlines() if line.startswith("mine")]
    assert float(row.split()[-1]) == pytest.approx(PERCENT["FaceSim"] - PERCENT["Natural"], abs=0.01)
    human = table.text("mine", read_scores(folder, "human"), "human")
    assert "Nexus" not in human
    assert "VINO" not in human, "its published row is of the Open-Domain"


@pytest.mark.parametrize(
    ("name", "entries", "sentence"),
    [
        ("gmescore", [1], "gmescore.json is no object of video ids"),
        ("gmescore", {"a": 0.5}, "'a' has no 'gme_score'"),
        ("gmescore", {"a": {"gme_score": "high"}}, "'gme_score' is 'high'; a finite number is expected"),
        ("facesim", {"a": {"cur_score": float("nan")}}, "'cur_score' is nan; a finite number is expected"),
        ("naturalscore_2", {"a": [4]}, r"'a' is \[4\]; a finite number is expected"),
    ],
)
def test_files_in_another_form_are_refused(folder, name, entries, sentence):
    (folder / f"{name}.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=sentence):
        read_scores(folder, "open")
    with pytest.raises(ValueError, match="is no folder of score files"):
        read_scores(folder / "none", "open")
