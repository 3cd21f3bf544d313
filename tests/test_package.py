"""The wheel: built, installed into an environment of its own, and used from another folder."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support.places import ROOT, environment
from support.runs import CACHE

SOURCES = ("refalign_jax", "tools", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command without this checkout on its path."""
    without = {name: value for name, value in environment(**variables).items() if name != "PYTHONPATH"}
    given = [str(x) for x in arguments]
    done = subprocess.run(given, capture_output=True, text=True, env=without, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=folder / "source")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_commands_recipes_and_templates_inside_the_package(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        metadata = opened.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"refalign_jax"}
    for kind, folder in (("tools", "tools"), ("configs", "configs")):
        expected = {f"refalign_jax/{kind}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert expected <= set(names)
    assert any(name.startswith("refalign_jax/report/templates/") for name in names)
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE)
    assert {"tpu", "cuda", "ahead", "parity", "dev"} <= {
        line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")
    }


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    """`refalign train tiny` finds the recipe that came with the wheel, and trains."""
    place = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=tmp_path)
    packages = next(place.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # all but this package's own finder
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", place / "bin/python", *install, cwd=tmp_path)
    where = run(place / "bin/python", "-c", "import refalign_jax; print(refalign_jax.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(place)
    assert "    train " in run(place / "bin/refalign", cwd=tmp_path).stdout
    fields = {"folder": tmp_path / "run", "steps": 2, "preview-every": 0, "held-out-every": 0}
    fields |= {"compilation-cache": CACHE}
    given = [x for name, value in fields.items() for x in (f"--train.{name}", value)]
    given += ["--model.dit.num-layers", 1, "--model.alignment.num-blocks", 1]  # less to compile
    run(place / "bin/refalign", "train", "tiny", *given, cwd=tmp_path)
    assert (tmp_path / "run/checkpoints/2").is_dir()


def test_the_clone_works_as_it_is(tmp_path):
    """`python tools/X.py` and a recipe's path, without an installation."""
    done = subprocess.run(
        [sys.executable, "tools/train.py", "configs/tiny.py", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    assert done.stdout.startswith("usage: tools/train.py configs/tiny.py [-h] [OPTIONS]")
