"""The pages of a verification and of two runs compared."""

import numpy as np
import pytest
from support import chromium

from refalign_jax.report.verification import write_comparison, write_verification
from refalign_jax.verify.report import Curves, Report
from refalign_jax.verify.runs import Comparison, Drift


def a_report():
    report = Report("float32")
    report.compare("velocity_t500", np.ones(3), np.ones(3), "forward")
    report.compare("velocity_t500_ffn", np.ones((2, 3)), np.full((2, 3), 1.1), "forward")
    report.skip(["sample_latents"], "values.npz lacks <negative_text>")
    report.curves.append(Curves("velocity_t500", {"attention": [1e-7, 2e-7], "ffn": [3e-7, 0.1]}, 2e-6, "block 1: ffn"))
    return report


def test_the_page_of_a_verification_names_where_it_diverges_and_lists_what_falls_short_first(tmp_path):
    write_verification(a_report(), tmp_path / "page.html", "Verification of values")
    text = (tmp_path / "page.html").read_text()
    assert "diverges first at <strong>block 1: ffn</strong>" in text
    assert text.index("FALLS SHORT") < text.index(">ok<")
    assert "lacks &lt;negative_text&gt;" in text
    assert text.count('<img class="chart"') == 1


def test_the_page_of_two_runs(tmp_path):
    steps = [1, 2, 3]
    drifts = [
        Drift("loss", steps, np.array([1e-7, 1e-6, 1e-2]), np.array([1e-5, 2e-5, 3e-5])),
        Drift("weights of step 3", ["dit/blocks/ffn/in/kernel/2"], np.array([1e-6]), np.array([1e-5])),
    ]
    comparison = Comparison(("a", "b"), drifts, "The bound is a model.")
    write_comparison(comparison, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<strong>loss</strong> diverges first at <strong>3</strong>" in text
    assert "dit/blocks/ffn/in/kernel/2" in text


@pytest.mark.parametrize("name", ["page.txt", "none/page.html"])
def test_a_page_elsewhere_is_refused_in_a_sentence(tmp_path, name):
    with pytest.raises(ValueError, match=r"name an \.html file in a folder that exists"):
        write_verification(a_report(), tmp_path / name, "")


@pytest.mark.skipif(chromium.BROWSER is None, reason="no browser")
def test_a_browser_shows_the_page_without_complaint(tmp_path):
    write_verification(a_report(), tmp_path / "page.html", "Verification of values")
    with chromium.page() as page:
        page.show(tmp_path / "page.html", width=390)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not page.complaints
