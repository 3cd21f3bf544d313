"""The package with one line changed, imported beside the real one."""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

from support.places import ROOT

PACKAGE = ROOT / "refalign_jax"


@functools.cache
def _code(path: Path) -> CodeType:
    return compile(path.read_text(encoding="utf-8"), str(path), "exec")


class _Loader(importlib.abc.Loader):
    def __init__(self, code: CodeType) -> None:
        self._code = code

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package's modules, one of them with other code."""

    def __init__(self, changed: Path, code: CodeType) -> None:
        self._changed, self._changed_code = changed, code

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] != "refalign_jax":
            return None
        place = ROOT.joinpath(*name.split("."))
        is_package = place.is_dir()
        file = place / "__init__.py" if is_package else place.with_suffix(".py")
        code = self._changed_code if file == self._changed else _code(file)
        return importlib.util.spec_from_file_location(
            name, file, loader=_Loader(code), submodule_search_locations=[str(place)] if is_package else None
        )


@contextlib.contextmanager
def mutant(file: str, old: str, new: str) -> Iterator[None]:
    """Inside of the block, importing `refalign_jax…` gives a fresh copy in which `old` reads `new` in one file."""
    path = PACKAGE / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "refalign_jax"}
    finder = _Finder(path, compile(text.replace(old, new), str(path), "exec"))
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "refalign_jax"]:
            del sys.modules[name]
        sys.modules.update(real)
