"""What the sections choose to show."""

from pathlib import Path

import numpy as np

from refalign_jax.report.figures import smoothed
from refalign_jax.report.render import ABSENT, number
from refalign_jax.report.run import Confusion, Evaluation, Sample
from refalign_jax.report.sections import by_subject, evaluation


def sample(id, *subjects):
    references = tuple((Path("r.png"), subject) for subject in subjects)
    return Sample(id=id, prompt="", video=Path("v.mp4"), references=references, truth=None, scores={})


def test_every_subject_is_shown_early():
    found = [
        sample("0", "b"),
        sample("1", "b", "a"),
        sample("2", "a", "b"),
        sample("3", "c", "a"),
        sample("4", "b", "b"),
    ]
    alone, several = by_subject([*found, sample("5", "a"), sample("6", None)])
    assert {name: [s.id for s in mine] for name, mine in alone.items()} == {"a": ["5"], "b": ["0", "4"]}
    assert [s.id for s in several] == ["3", "6", "1", "2"]


def test_running_mean():
    values = np.ones(200)
    values[100] = 12
    values[150] = np.nan
    smooth = smoothed(values)
    assert smooth[94] == smooth[106] == 1
    np.testing.assert_allclose(smooth[95:106], 2)
    assert np.isfinite(smooth).all()
    assert np.isnan(smoothed(np.array([np.nan]))).all()


def test_numbers_as_a_reader_wants_them():
    shown = [number(v) for v in (3, 12345, 64.0, 0.123456, 3072.0, float("nan"), "x", True)]
    assert shown == ["3", "12,345", "64", "0.123", "3,072", ABSENT, "x", "True"]


def test_texts_are_escaped_and_shares_shade_the_cells():
    confusion = Confusion(title="t", labels=("a", "<b>"), matrix=np.array([[3.0, 1.0], [0.0, 0.0]]))
    found = Evaluation(title='<i> & "', numbers={"<u>": 0.5}, confusions=(confusion,), notes=("<s>",))
    shown = evaluation(found).html
    assert '<p class="lead">&lt;i&gt; &amp; &#34;</p>' in shown
    for text in ("&lt;b&gt;", "&lt;u&gt;", "&lt;s&gt;"):
        assert text in shown
    for tag in ("<b>", "<i>", "<u>", "<s>"):
        assert tag not in shown
    assert shown.count("--share:0.750") == shown.count("--share:0.250") == 1
    assert shown.count('class="none"') == 2
