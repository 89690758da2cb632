"""What every recipe shares: typed config, run folder, result.json, bundled data, layer-wise learning rates."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from sadam_integrations.version import __version__

C = TypeVar("C")

RUN_FILES = ("result.json", "figure.png", "model", "checkpoints", "config.yaml")
"""What a run writes into its folder; ``result.json`` comes last, so that its presence means "finished"."""

NOT_COMPARED = ("output_dir", "overwrite")
"""Keys that may differ between an interrupted run and the one that continues it."""


class RecipeError(Exception):
    """Something that the person who started the recipe can mend: shown as one line, without a stack trace."""


def main(
    config_class: type[C],
    run: Callable[[C], Any],
    argv: Sequence[str] | None,
    doc: str | None,
    default_config: str | Path,
) -> int:
    """Parses the command line, runs the recipe and turns what can go wrong into a message and an exit code.

    Args:
        config_class: The dataclass that holds the recipe's config.
        run: The recipe itself.
        argv: The command line without the program's name; ``None`` takes it from ``sys.argv``.
        doc: The recipe's description, the first part of ``--help``.
        default_config: The YAML file that has a value for every key.

    Returns:
        0 if it went well, 2 for a mistake in the config or the data, 130 if it was interrupted.
    """
    config: Any = None
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, doc, default_config)
        run(config)
    except (RecipeError, OSError) as error:  # an OSError names the file: a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the same command without --overwrite" if config and config.overwrite else "the same command"
        print(f"\nInterrupted: {again} goes on from the last checkpoint, if there is one.", file=sys.stderr)
        return 130
    return 0


def parse(config_class: type[C], argv: Sequence[str], doc: str | None, default_config: str | Path) -> C:
    """Reads a config from the default file, then ``--config FILE``, then ``--key value``, each over the one before.

    Args:
        config_class: A dataclass; the "Attributes" of its docstring are the help of its keys. Its ``__post_init__``
            may raise a ``ValueError`` for a value that is out of range.
        argv: The command line without the program's name. A bare ``--flag`` means ``--flag true``.
        doc: What ``--help`` says first.
        default_config: The YAML file that has a value for every key.

    Returns:
        The config.

    Raises:
        RecipeError: If a key is unknown, or a value or a file is not valid.
    """
    require("jsonargparse", "docstring_parser", "yaml")
    import docstring_parser
    import jsonargparse

    class Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        """Keeps the line breaks of the description."""

    hints = typing.get_type_hints(config_class)
    helps = {p.arg_name: p.description for p in docstring_parser.parse(config_class.__doc__ or "").params}
    parser = jsonargparse.ArgumentParser(
        prog=Path(default_config).with_suffix(".py").name,
        description=doc,
        formatter_class=Formatter,
        default_config_files=[str(default_config)],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file whose keys replace those of the default config.")
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        parser.add_argument(f"--{field.name}", type=hints[field.name], help=helps.get(field.name))
    flags = [f"--{name}" for name, hint in hints.items() if hint is bool]
    following = [*argv[1:], "--"]
    argv = [
        f"{word}=true" if word in flags and after.startswith("-") else word
        for word, after in zip(argv, following, strict=False)
    ]
    try:
        values = parser.parse_args(argv).as_dict()
        return config_class(**{name: values[name] for name in hints})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise RecipeError(_one_line(str(error), hints)) from None


def _one_line(message: str, hints: dict[str, Any]) -> str:
    """Words an error of the parser: what was wrong, and the nearest valid thing."""
    if found := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([\w.-]+)", message):
        key = found[1] or found[2]
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
        answer = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(hints)}"
        return f"unknown key {key!r}: {answer}"
    found = re.search(r'key "(\w+)":.*?(?:Got value|Given value): ([^\n]*)', message, re.DOTALL)
    if found and found[1] in hints:
        hint = hints[found[1]]
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("None", "null")
        return f"{found[1]}: {found[2]!r} is not a valid value, expected {expected}"
    return " ".join(message.split())


def require(*modules: str, extra: str = "recipes") -> None:
    """Raises if a module is not installed.

    Args:
        modules: Names of top-level modules.
        extra: The extra of this package that brings them.

    Raises:
        RecipeError: If one is missing.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise RecipeError(f'{", ".join(missing)} not found: pip install "sadam-integrations[{extra}]"')


def recipes_folder() -> Path:
    """Returns the folder of the recipes: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "_recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def data_file(name: str) -> Path:
    """Returns the path of a bundled data file.

    Args:
        name: The file's name in ``recipes/data``.

    Raises:
        RecipeError: If there is no such file.
    """
    path = recipes_folder() / "data" / name
    if not path.is_file():
        raise RecipeError(f"the bundled file {name} is missing from {path.parent}: install the package again")
    return path


def is_main_process() -> bool:
    """Whether this is the process that writes files: the only one, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def open_run(config: Any) -> Path:
    """Makes a run's folder ready: a new run, or the continuation of an interrupted one with the same config.

    Only the main process touches the folder.

    Args:
        config: A dataclass with ``output_dir`` and ``overwrite``; it is written to ``config.yaml`` in the folder.

    Returns:
        The folder.

    Raises:
        RecipeError: If the folder holds a finished run, an interrupted run with another config, or other files.
    """
    import yaml

    folder = Path(config.output_dir)
    if not is_main_process():
        return folder
    fix = "give --overwrite true to replace it, or another --output_dir"
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir: {folder} is a file: give another --output_dir")
    if folder.is_dir() and not saved.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RecipeError(f"output_dir: {folder} holds files that are not a run's: give another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    if config.overwrite:
        for name in RUN_FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif (folder / "result.json").exists():
        raise RecipeError(f"output_dir: {folder} holds a finished run: {fix}")
    elif any(folder.glob("checkpoints/*/trainer_state.json")):
        try:
            before, now = dict(yaml.safe_load(saved.read_text(encoding="utf-8"))), dataclasses.asdict(config)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise RecipeError(f"output_dir: {saved} cannot be read ({error}): {fix}") from None
        if differing := [k for k in now if k not in NOT_COMPARED and before.get(k) != now[k]]:
            changes = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in differing)
            raise RecipeError(f"output_dir: {folder} holds an interrupted run with another config ({changes}): {fix}")
        return folder
    write_text(saved, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    return folder


def _lock(folder: Path) -> None:
    """Keeps other processes out of a run's folder until this one ends, however it ends; not on Windows."""
    try:
        import fcntl
    except ImportError:
        return
    if str(folder) not in _LOCKS:
        handle = (folder / ".lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise RecipeError(
                f"output_dir: another process is running in {folder}: give another --output_dir"
            ) from None
        _LOCKS[str(folder)] = handle


_LOCKS: dict[str, Any] = {}


def write_text(path: Path, text: str) -> None:
    """Writes a file in one go: a reader, or a crash, sees the old content or the new one, nothing between.

    Args:
        path: Where to.
        text: The new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(folder: Path, recipe: str, config: Any, metrics: dict, history: dict, seconds: float) -> dict:
    """Writes ``result.json``, the last file of a run.

    Args:
        folder: The run's folder.
        recipe: The recipe's name.
        config: The resolved config, a dataclass.
        metrics: The final numbers.
        history: Lists of points over training.
        seconds: How long the run took, wall clock.

    Returns:
        What was written.
    """
    result = {
        "recipe": recipe,
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "config": dataclasses.asdict(config),
        "history": history,
        "versions": versions(),
        "hardware": hardware(),
    }
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that a recipe may use."""
    found = {"sadam-integrations": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "lightning", "datasets", "evaluate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Returns what the run was made on: processor, cores, threads, GPUs, processes."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = model[1]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "system": platform.platform(),
    }


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Returns the factor of each parameter's learning rate under layer-wise decay.

    What follows the layers (pooler, head) has factor 1, the last layer ``decay``, the one before ``decay`` squared,
    and so on down to the embeddings.

    Args:
        names: Parameter names of a Hugging Face model, such as ``bert.encoder.layer.3.attention.self.query.weight``.
        decay: The factor from one layer to the one below it, in (0, 1].

    Returns:
        The factor for each name.

    Raises:
        RecipeError: If no name has a layer number.
    """
    names = list(names)
    numbers = {name: re.search(r"\b(?:layer|layers|h|blocks?)\.(\d+)\.", name) for name in names}
    depths = {name: int(number[1]) + 1 for name, number in numbers.items() if number}
    if not depths:
        raise RecipeError("layer_lr_decay: the model's parameters have no numbered layers: set layer_lr_decay to 1")
    top = max(depths.values()) + 1
    below = re.compile(r"embed|\bwte\b|\bwpe\b")
    return {name: decay ** (top - depths.get(name, 0 if below.search(name) else top)) for name in names}
