"""``sadam cp``: a recipe and its configs as files of one's own."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from sadam_integrations.cli.recipes import find
from sadam_integrations.recipe import config_files
from sadam_integrations.run_folder import RecipeError, write_text

SUMMARY = "copy a recipe to edit it"
DESCRIPTION = """\
Copies a recipe and its default config, and another config if you name one, as files of your own.

  sadam cp bert .                            ./bert.py and ./bert.yaml
  sadam cp vit mine/try.py                   mine/try.py and mine/try.yaml
  sadam cp vit . --config vit_cifar10        vit_cifar10.yaml as well
  sadam run ./bert.py                        runs the copy

What recipes share stays in the package, sadam_integrations.recipe; what only a few do, in a module beside them whose
name begins with _, is copied too.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a name that sadam ls shows")
    parser.add_argument("to", metavar="TO", type=Path, help="a folder, or the new name of the Python file")
    parser.add_argument("--config", metavar="NAME", help="a config to copy beside the default one")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def go(args: argparse.Namespace) -> int:
    """Copies the files."""
    source = find(args.recipe)
    target = args.to if args.to.suffix == ".py" else args.to / source.name
    configs = config_files(source.with_suffix(".yaml"))
    if args.config and args.config not in [path.stem for path in configs]:
        raise RecipeError(f"--config: {args.config!r} is none of {', '.join(path.stem for path in configs)}")
    wanted = [path for path in configs if path.stem in (source.stem, args.config)]
    copies = {source: target}
    copies |= {path: target.with_name(path.name) for path in beside(source)}
    copies |= {path: target.with_name(path.name.replace(source.stem, target.stem, 1)) for path in wanted}
    there = [str(copy) for copy in copies.values() if os.path.lexists(copy)]  # a link that leads nowhere is there too
    if there and not args.overwrite:
        raise RecipeError(f"{', '.join(there)} exists: give --overwrite to replace it, or another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    for original, copy in copies.items():
        write_text(copy, original.read_text(encoding="utf-8"))
        print(copy)
    command = target if target.is_absolute() or len(target.parts) > 1 else f"./{target}"
    print(f"Run it: sadam run {command}" + (f" --config {copies[wanted[-1]].stem}" if args.config else ""))
    return 0


def beside(source: Path) -> list[Path]:
    """Returns the modules beside a recipe that it imports, and those that these import."""
    found: list[Path] = []
    for name in re.findall(r"^(?:import|from) (_\w+)", source.read_text(encoding="utf-8"), re.MULTILINE):
        path = source.with_name(f"{name}.py")
        if path.is_file():
            found += [path, *beside(path)]
    return list(dict.fromkeys(found))
