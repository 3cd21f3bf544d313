"""The house rules that a machine can check: who may import whom, sizes, names, and words.

Each rule is a function that returns its violations as `path: what is wrong` lines. CONTRIBUTING.md explains the rules.
"""

import ast
import collections
import functools
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.places import ROOT, environment

FLOORS: tuple[tuple[str, ...], ...] = (
    ("config", "trees", "types", "atomic", "remote", "locks", "digests", "devices", "interrupt", "version"),
    ("provenance", "flops", "sharding", "command"),
    ("models",),
    ("alignment", "flow", "solvers", "caching"),
    ("objective", "sampling", "initial"),
    ("convert",),
    ("encoders",),
    ("data",),
    ("drawing",),
    ("trainer",),
    ("inference", "verify"),
    ("perf", "report", "evaluate"),
    ("demo", "soak", "studio"),
    ("tools",),
)
"""Rooms from the ground up; a room imports from its own floor or from those below, never from those above.

A room is a folder or a module of refalign_jax/, or one of the folders beside it. Recipes (configs/) see `config` alone.
"""

MAX_FILE_LINES = 430
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

BANNED_WORDS = (
    r"whither|whence|whereof|thereof|wherewith|hitherto|forthwith|lest|amiss|anew",
    r"tell|tells|told",
    r"(has|have) to stand",
    r"by count of",
    r"of what size",
    r"for want of",
)
"""What needs a second reading, or what standard words say better: log, print, report, measure; required, missing."""

PACKAGE = sorted((ROOT / "refalign_jax").rglob("*.py"))
COMMANDS = sorted((ROOT / "tools").glob("*.py"))
RECIPES = sorted((ROOT / "configs").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CODE = [*PACKAGE, *COMMANDS, *RECIPES]


def short(path: Path) -> str:
    """The path as seen from the repository's root."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """The dotted name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in CODE}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import within the repository, wherever in the file it stands."""
    for node in ast.walk(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("refalign_jax", "tools", "configs"):
                yield node.lineno, name


def room(name: str) -> str:
    """The room of a module, or of a name in it."""
    first, *rest = name.split(".")
    if first != "refalign_jax":
        return first
    if name == "refalign_jax.__version__" or not rest:
        return "version"
    return rest[0]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """First line and text of every docstring, of every string that stands alone, and of every comment."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#! ")


def climbing_imports() -> list[str]:
    level = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    found = []
    for path in CODE:
        here = room(module_name(path))
        for line, name in imports(path):
            there = room(name)
            if here == there:
                continue
            if here == "configs":
                if there != "config":
                    found.append(
                        f"{short(path)}:{line}: a recipe imports {name}; recipes need refalign_jax.config alone"
                    )
            elif there not in level or here not in level:
                missing = here if here not in level else there
                found.append(f"{short(path)}:{line}: the room {missing!r} has no place in FLOORS")
            elif level[there] > level[here]:
                found.append(f"{short(path)}:{line}: {here} imports {name}, which lies on a floor above it")
    return found


def mutual_imports() -> list[str]:
    """Rooms that reach each other by imports, directly or through others."""
    reached = collections.defaultdict(set)
    for path in CODE:
        here = room(module_name(path))
        reached[here] |= {room(name) for _, name in imports(path)} - {here}
    for middle in list(reached):
        for start in reached:
            if middle in reached[start]:
                reached[start] |= reached[middle]
    pairs = {tuple(sorted((a, b))) for a in reached for b in reached[a] if a != b and a in reached.get(b, ())}
    return [f"refalign_jax/{a}: imports {b}, and {b} imports {a}" for a, b in sorted(pairs)]


def long_files() -> list[str]:
    sizes = {short(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    return [f"{path}: {size} lines; at most {MAX_FILE_LINES}" for path, size in sizes.items() if size > MAX_FILE_LINES]


def long_functions() -> list[str]:
    return [
        f"{short(path)}: {node.name} has {size} lines; at most {MAX_FUNCTION_LINES}"
        for path in CODE
        for node in functions(path)
        if (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def many_parameters() -> list[str]:
    found = []
    for path in CODE:
        for node in functions(path):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MAX_PARAMETERS:
                found.append(f"{short(path)}: {node.name} has {count} parameters; at most {MAX_PARAMETERS}")
    return found


def private_imports() -> list[str]:
    """Names with a leading underscore taken from another module of the repository, by import or as an attribute."""
    found = []
    for path in (*CODE, *TESTS):
        modules = set()
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module.split(".")[0] not in ("refalign_jax", "tools"):
                continue
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    found.append(f"{short(path)}: imports {alias.name} from {node.module}")
                if f"{node.module}.{alias.name}" in MODULES:
                    modules.add(alias.asname or alias.name)
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id in modules and node.attr.startswith("_") and not node.attr.startswith("__"):
                found.append(f"{short(path)}: uses {node.value.id}.{node.attr}")
    return found


def tools_imported_by_tests() -> list[str]:
    """Tests that import commands: commands are run, and what is tested by itself belongs into the package."""
    return [f"{short(path)}: imports {name}" for path in TESTS for _, name in imports(path) if name.startswith("tools")]


def copies() -> list[str]:
    """Six lines of code, more than brackets and imports, that stand in two places."""
    seen: dict[tuple[str, ...], str] = {}
    found = {}
    for path in CODE:
        lines = list(_code_lines(path))
        for start in range(len(lines) - 5):
            window = tuple(text for _, text in lines[start : start + 6])
            if sum(len(text) > 12 for text in window) < 5:
                continue
            place = f"{short(path)}:{lines[start][0]}"
            if seen.setdefault(window, place) != place:
                found.setdefault((seen[window].split(":")[0], short(path)), f"{place}: as {seen[window]}")
    return list(found.values())


def _code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that hold statements other than imports, docstrings and the heads of functions."""
    skipped = {
        line for node in functions(path) for line in range(node.lineno, max(node.body[0].lineno, node.lineno + 1))
    }
    for node in ast.walk(tree(path)):
        alone = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if alone or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = text.split("  # ")[0].strip()
        if text and number not in skipped and not text.startswith("#"):
            yield number, text


def prose_that_begins_with_of() -> list[str]:
    return [
        f"{short(path)}:{line}: {text.splitlines()[0]}"
        for path in (*CODE, *TESTS)
        for line, text in prose(path)
        if text.startswith("Of ")
    ]


def banned_words() -> list[str]:
    pattern = re.compile(rf"\b({'|'.join(BANNED_WORDS)})\b", re.IGNORECASE)
    found = []
    for path in CODE:
        found += [f"{short(path)}:{line}: {m[0]!r}" for line, text in prose(path) for m in pattern.finditer(text)]
    for path in documents():
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{short(path)}:{line}: {m[0]!r}" for m in pattern.finditer(text)]
    return found


def documents() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md" and path.name not in ("CHANGELOG.md", "api.md")]


@functools.cache
def tracked() -> tuple[Path, ...]:
    """All files of the repository, whether committed yet or not."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not in a git checkout")
    return tuple(path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file())


def paths_outside() -> list[str]:
    """Names of places that only one machine has."""
    pattern = re.compile(r"\.\./shared|(?<![\w.:/])/work/")
    found = []
    for path in tracked():
        if path.suffix in (".py", ".md", ".json", ".ipynb", ".toml", ".cff", ".html", ".css", "") and path != Path(
            __file__
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{short(path)}: {match[0]!r}" for match in pattern.finditer(text)]
    return found


RULES: tuple[Callable[[], list[str]], ...] = (
    climbing_imports,
    mutual_imports,
    long_files,
    long_functions,
    many_parameters,
    private_imports,
    tools_imported_by_tests,
    copies,
    prose_that_begins_with_of,
    banned_words,
    paths_outside,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    found = rule()
    assert not found, f"{rule.__name__}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("refalign_jax.config", ("jax", "flax", "grain", "orbax")),
        (
            "refalign_jax.trainer.loop",
            ("matplotlib", "sklearn", "skimage", "transformers", "torch", "av", "PIL.ImageShow"),
        ),
    ],
)
def test_imports_are_light(imported, absent):
    code = f"import sys, {imported}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert not done.stdout.strip(), f"import {imported} imports {done.stdout.strip()}"
