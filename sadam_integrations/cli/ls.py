"""``sadam ls``: the recipes and their configs, as the folder has them."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from sadam_integrations.cli.recipes import names
from sadam_integrations.recipe import config_files

SUMMARY = "list the recipes and their configs"
DESCRIPTION = """\
Lists the recipes and, below each, its configs: what it trains, on what, how long it takes, what comes out.

  sadam run vit                            the default config, the one named like its recipe
  sadam run vit --config vit_cifar10       another one
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the verb has no arguments."""


def go(args: argparse.Namespace) -> int:
    """Prints the list."""
    recipes = {name: (file, config_files(file.with_suffix(".yaml"))) for name, file in names().items()}
    width = max(len(path.stem) for _, configs in recipes.values() for path in configs) + 2
    for name, (file, configs) in recipes.items():
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"{name}: {doc.partition(chr(10))[0].replace('``', '')}")
        for path in configs:
            print(f"    {path.stem:{width}}{_first_comment(path)}")
    return 0


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
