"""Finds the recipes and loads them: those of the package by name, anyone's own by the path of its file."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from sadam_integrations.recipe import recipes_folder
from sadam_integrations.run_folder import RecipeError


def names() -> dict[str, Path]:
    """Returns the recipes of the package, the studies last, from name to file."""
    folder = recipes_folder()
    files = [file for pattern in ("*.py", "studies/*.py") for file in sorted(folder.glob(pattern))]
    return {str(file.relative_to(folder).with_suffix("").as_posix()): file for file in files}


def find(word: str) -> Path:
    """Returns the file of a recipe.

    Args:
        word: A name that ``sadam ls`` shows, or the path of a Python file.

    Raises:
        RecipeError: If there is no such recipe.
    """
    known = names()
    if word in known:
        return known[word]
    path = Path(word)
    if path.suffix == ".py":
        if not path.is_file():
            raise RecipeError(f"there is no file {word!r}")
        return path
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    if Path(f"{word}.py").is_file():
        hint = f"for your own file, write {word}.py"
    raise RecipeError(f"unknown recipe {word!r}: {hint}")


def load(path: Path, *needed: str) -> ModuleType:
    """Imports a recipe.

    Args:
        path: Its file.
        needed: What the module must have.

    Raises:
        RecipeError: If it lacks something that is needed, or needs a package that is not installed.
    """
    name = f"recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # there is one for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))  # a recipe of one's own may have modules beside it
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        hint = ': pip install "sadam-integrations[recipes]"' if path in names().values() else ""
        raise RecipeError(f"{path.name} needs {error.name}, which is not installed{hint}") from None
    if missing := [attribute for attribute in needed if not hasattr(module, attribute)]:
        raise RecipeError(f"{path} is not a recipe that can do this: it has no {', '.join(missing)}")
    return module
