"""The examples of docs/extending.md: their files are written, their lines changed and their commands run, in a copy."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from support.pages import FENCE
from support.places import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {
    title.split()[-1].lower(): body
    for title, body in re.findall(r"^## (Another \w+)\n(.*?)(?=^## )", PAGE, re.M | re.S)
}


def _change(lines: str, folder) -> None:
    """Replaces the lines that begin with - by those that begin with +."""
    name, *rest = lines.splitlines()
    path = folder / name.removeprefix("# ")
    old = "\n".join(line[1:] for line in rest if line.startswith("-"))
    new = "\n".join(line[1:] for line in rest if line.startswith("+"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} does not hold these lines once:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("section", SECTIONS)
def test_example_works(section, tmp_path):
    for name in ("refalign_jax", "tools", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for title in SECTIONS:  # an example may use files that another made
        for language, code in FENCE.findall(SECTIONS[title]):
            if language == "python" and (title == section or code.startswith("# make_")):
                path = tmp_path / code.splitlines()[0].removeprefix("# ")
                path.write_text(code, encoding="utf-8")
    commands = []
    for language, code in FENCE.findall(SECTIONS[section]):
        if language == "diff":
            _change(code, tmp_path)
        elif language == "sh":
            commands.append(code)
    assert commands
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    script = f'python() {{ "{sys.executable}" "$@"; }}\nset -e\n' + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
