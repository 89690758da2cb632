"""Finds the recipes: those of the package by name, anyone's own by the path of its file."""

from __future__ import annotations

import difflib
from pathlib import Path

from sadam_integrations.recipe import recipes_folder
from sadam_integrations.run_folder import RecipeError


def names() -> dict[str, Path]:
    """Returns the recipes of the package, the studies last, from name to file."""
    folder = recipes_folder()
    files = [file for pattern in ("[!_]*.py", "studies/[!_]*.py") for file in sorted(folder.glob(pattern))]
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
