"""The Markdown pages: code blocks, headings, links, and the code paths that they name."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.places import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FOLDERS = ("refalign_jax", "configs", "tools", "tests", "docs", "benchmarks")


def pages() -> list[Path]:
    """Every Markdown page of the repository."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in one language."""
    return [code for found, code in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that lie in the repository."""
    for target in LINK.findall(prose(page)):
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def paths(page: Path) -> Iterator[str]:
    """Paths of the repository's files that a page names in backticks or in the commands of its code blocks."""
    text = page.read_text(encoding="utf-8")
    spans = [word for span in CODE_SPAN.findall(prose(page)) for word in span.split()]
    words = [word for _, code in FENCE.findall(text) for word in code.split()]
    for word in (*spans, *words):
        word = word.strip("\"'`,;:()")
        if word.split("/")[0] in FOLDERS and "/" in word and not re.search(r"[<>$…=]", word):
            yield word.split("::")[0]


def tracked() -> list[str]:
    """Files that git knows or would add, relative to the root."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.splitlines()
