"""The templates: what is missing is an error, no HTML is made elsewhere, and the charts have the page's colours."""

import re
from pathlib import Path

import jinja2
import pytest

import refalign_jax.report
from refalign_jax.report.render import data_uri, render
from refalign_jax.report.theme import DARK, LIGHT, STYLE_SHEET, read_themes

SOURCES = sorted(Path(refalign_jax.report.__file__).parent.glob("*.py"))


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'facts' is undefined"):
        render("about.html", recipe="")


def test_files_become_uris():
    assert data_uri(b"\x89PNG", "image/png") == "data:image/png;base64,iVBORw=="


def test_the_style_sheet_has_both_themes():
    assert LIGHT.paper == "#ffffff"
    assert DARK.paper == "#15181c"
    assert read_themes(STYLE_SHEET.read_text()) == (LIGHT, DARK)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_html_outside_the_templates(source):
    assert not re.search(r"</?[a-z][a-z0-9]*[ >]", source.read_text())


def test_matplotlib_draws_in_one_file():
    assert [path.name for path in SOURCES if "matplotlib" in path.read_text()] == ["figures.py"]
