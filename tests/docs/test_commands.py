"""The commands on the pages: each tool, subcommand and recipe exists, and each option is one that the tool has."""

import collections
import re
import subprocess
import sys

import pytest
from support.pages import CODE_SPAN, FENCE, pages, prose
from support.places import ROOT, environment

COMMAND = re.compile(r"\bpython (tools/\w+\.py)([^`;|&)]*)")
WITH_COMMANDS = ("tools/convert.py", "tools/benchmark_sources.py")
"""Tools whose first argument is the name of a command."""


def _commands() -> dict[tuple[str, str], set[str]]:
    """Options used on the pages, by tool and by its subcommand or recipe."""
    found = collections.defaultdict(set)
    for page in pages():
        if page.name == "CHANGELOG.md":
            continue
        blocks = [
            code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in ("sh", "yaml")
        ]
        for text in (*blocks, *CODE_SPAN.findall(prose(page))):
            for tool, rest in COMMAND.findall(re.sub(r"\\\n", " ", text)):
                words = re.sub(r"\s#.*", "", rest.split("\n")[0]).replace("[", " ").replace("]", " ").split()
                first = words[0] if words and not words[0].startswith(("-", "…")) else ""
                kept = first if first.endswith(".py") or tool in WITH_COMMANDS else ""
                if tool == "tools/prepare.py":
                    kept = first if first in ("opens2v", "phantom") else "jsonl"
                found[tool, kept] |= {word.split("=")[0] for word in words if word.startswith("--")}
    return found


COMMANDS = _commands()


@pytest.mark.parametrize(("tool", "first"), sorted(COMMANDS))
def test_options_exist(tool, first):
    assert (ROOT / tool).is_file()
    help_ = subprocess.run(
        [sys.executable, tool, *([first] if first else []), "--help"],
        cwd=ROOT,
        env=environment(COLUMNS="200"),
        capture_output=True,
        text=True,
    )
    assert help_.returncode == 0, help_.stderr
    known = set(re.findall(r"--[\w.-]+", help_.stdout)) | {"--help"}
    assert COMMANDS[tool, first] <= known
