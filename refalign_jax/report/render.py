"""Renders the templates of the report; Jinja2 escapes every value that is put into them.

The templates, the style sheet and the script lie in `templates/`. `page.html` is the document, `pieces.html` holds the
macros that the sections share, and there is one file for each section.
"""

from __future__ import annotations

import base64
import functools
import math
from typing import Any

import jinja2
from markupsafe import Markup

from refalign_jax.report.theme import subject_sign

ABSENT = "\u2013"
"""An en dash, shown in place of a missing number."""


def render(template: str, **values: Any) -> Markup:
    """Renders a template.

    Args:
      template: file name in `templates/`.
      **values: the variables of the template. One that is missing is an error.
    """
    return Markup(_environment().get_template(template).render(values))


def number(value: object) -> str:
    """Formats a value for a reader: numbers with three significant digits, a dash for NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return ABSENT
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def data_uri(content: bytes, media_type: str) -> str:
    """Encodes a file as a `data:` URI, which keeps the page in one file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("refalign_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "data_uri": data_uri}
    environment.globals["subject_sign"] = subject_sign
    return environment
