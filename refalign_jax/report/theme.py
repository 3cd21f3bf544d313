"""Colours of the page and of its charts, in light and in dark."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

STYLE_SHEET = Path(__file__).parent / "templates" / "style.css"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """One set of colours, as `#rrggbb`."""

    paper: str
    """Background of the page and of the charts."""
    soft: str
    """Background of boxes on the page."""
    line: str
    """Borders, axes and grid lines."""
    muted: str
    """Secondary text and curves."""
    ink: str
    """Text."""
    accent: str
    """Links and the curves that matter most."""


def read_themes(style_sheet: str) -> tuple[Theme, Theme]:
    """Reads the light and the dark colours from a style sheet, so that the charts have the colours of the page.

    Args:
      style_sheet: CSS whose first block of `--name: #rrggbb` variables is the light theme, the second the dark one.
    """
    names = [field.name for field in dataclasses.fields(Theme)]
    found = re.findall(rf"--({'|'.join(names)}): *(#[0-9a-f]{{6}});", style_sheet)
    assert [name for name, _ in found] == 2 * names, found
    return Theme(**dict(found[: len(names)])), Theme(**dict(found[len(names) :]))


LIGHT, DARK = read_themes(STYLE_SHEET.read_text(encoding="utf-8"))

SUBJECT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8b8d98", "#b8a800")
"""The palette of Okabe and Ito, safe for colour-blind readers, with grey for black and a darker yellow."""
SUBJECT_MARKERS = (("o", "●"), ("^", "▲"), ("s", "■"), ("D", "◆"))
"""Matplotlib's marker and the page's character. Each round through the colours takes the next."""


def subject_sign(number: int) -> tuple[str, str, str]:
    """Colour, Matplotlib marker and character on the page of a subject."""
    rounds, colour = divmod(number, len(SUBJECT_COLOURS))
    return (SUBJECT_COLOURS[colour], *SUBJECT_MARKERS[rounds % len(SUBJECT_MARKERS)])
