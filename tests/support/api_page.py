"""Writes docs/api.md from the package's docstrings, without importing it.

python tests/support/api_page.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = ROOT / "refalign_jax"

ROOMS = {
    "": "The method, and what it stands on",
    "config": "Configuration",
    "models": "Models",
    "convert": "Published weights",
    "encoders": "Encoders",
    "data": "Data",
    "trainer": "Training",
    "inference": "Sampling videos",
    "verify": "Verification",
    "perf": "Performance",
    "report": "Report",
    "demo": "Demo",
}
"""Headings by folder, in the order of the page; other folders follow under their own names."""

INTRODUCTION = """# API

Every public name of the package with the first sentence of its docstring. `python tests/support/api_page.py` writes
this page from the code; the docstrings themselves have shapes, units, ranges, errors and sources. The dimension letters
are explained in [method](method.md#letters).
"""


def first_sentence(docstring: str | None) -> str:
    """The first paragraph's first sentence, on one line, safe in a table."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    end = paragraph.find(". ")
    return (paragraph if end < 0 else paragraph[: end + 1]).replace("|", "\\|").replace("<", "&lt;")


def public_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Functions with their parameters' names, classes, and constants that have a docstring of their own."""
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            keywords = [a.arg for a in node.args.kwonlyargs]
            if keywords:
                arguments += ["*", *keywords]
            yield f"{node.name}({', '.join(arguments)})", first_sentence(ast.get_docstring(node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, first_sentence(ast.get_docstring(node))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            value = following.value
            documented = isinstance(value, ast.Constant) and isinstance(value.value, str)
            if documented and isinstance(target, ast.Name) and not target.id.startswith("_"):
                yield target.id, first_sentence(value.value)


def section(path: Path) -> str:
    """One module's heading, sentence and table; empty where it has no public name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rows = [f"| `{name}` | {sentence} |" for name, sentence in public_names(tree)]
    if not rows:
        return ""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return "\n".join([f"### {name}", "", first_sentence(ast.get_docstring(tree)), "", "| | |", "|---|---|", *rows, ""])


def page() -> str:
    """The whole page."""
    rooms: dict[str, list[Path]] = {room: [] for room in ROOMS}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        rooms.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    text = [INTRODUCTION]
    for room, paths in rooms.items():
        sections = [found for path in paths if (found := section(path))]
        if sections:
            text += [f"## {ROOMS.get(room, room.capitalize())}\n", *sections]
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written: {PAGE}")
