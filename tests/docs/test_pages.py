"""The pages: links, anchors and paths exist; nothing points outside the repository; README is one sitting long."""

import re

import pytest
from support import api_page
from support.pages import anchors, blocks, links, pages, paths
from support.places import ROOT

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())


@PAGES
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@PAGES
def test_named_paths_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names files that were")
    made = {code.splitlines()[0].removeprefix("# ") for code in blocks(page, "python")}  # by the page's own examples
    named = {path: re.sub(r"\{[^}]*\}", "*", path.rstrip("/")) for path in paths(page)}
    assert not [path for path, pattern in named.items() if path not in made and not any(ROOT.glob(pattern))]


@PAGES
def test_nothing_points_outside_the_repository(page):
    text = page.read_text(encoding="utf-8")
    outside = [target for target in links(page) if not (page.parent / target).resolve().is_relative_to(ROOT)]
    outside += re.findall(r"(?<![\w.])(?:/work|/home|/root)/\S*|\bMETHOD\.md|\bDESIGN\.md|\bFORMATS\.md", text)
    assert not outside


def test_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_every_page_can_be_reached_from_the_readme():
    linked = {target.partition("#")[0] for target in links(ROOT / "README.md")}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_api_page_is_up_to_date():
    """`python tests/support/api_page.py` writes it."""
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page()
