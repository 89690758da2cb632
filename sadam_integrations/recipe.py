"""What every recipe shares: typed config, messages, bundled data, layer-wise learning rates, the run's folder."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import importlib.util
import json
import logging
import math
import os
import re
import reprlib
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from sadam_integrations import alr, plots
from sadam_integrations.run_folder import RecipeError, is_main_process, not_written, open_run, reason, say, write_result

__all__ = [
    "RecipeError",
    "check",
    "config_files",
    "data_file",
    "finish",
    "interrupted",
    "is_main_process",
    "layer_scales",
    "load",
    "main",
    "open_run",
    "parse",
    "reason",
    "recipes_folder",
    "require",
    "say",
    "write_result",
]

C = TypeVar("C")


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
        return _failed(error, config)
    except KeyboardInterrupt:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # under torchrun, sadam run says it
            say(interrupted(bool(config and config.overwrite)), sys.stderr)
        return 130
    except Exception as error:
        if not_written(error):
            return _failed(error, config)
        logging.getLogger(__name__).exception("the run ended with an error")
        raise
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them
    return 0


def _failed(error: Exception, config: Any) -> int:
    """Says what was wrong; the log also has the stack trace of what is not a mistake in the config."""
    logging.getLogger(__name__).error("%s", error, exc_info=not isinstance(error, RecipeError))
    message = str(error)
    if config and (what := not_written(error)):
        message = f"output_dir: {config.output_dir} cannot be written to ({what}): the same command goes on from the "
        message += "last checkpoint, if there is one"
    if is_main_process():
        print(f"error: {message}", file=sys.stderr)
    elif config:  # what is wrong in the command line is said once
        print(f"error in process {os.environ['RANK']}: {message}", file=sys.stderr)
    return 2


def interrupted(overwrite: bool = False) -> str:
    """Returns what is said after Ctrl-C.

    Args:
        overwrite: Whether the command, given again, would replace the run.
    """
    again = "the same command without --overwrite" if overwrite else "the same command"
    return f"\nInterrupted: {again} goes on from the last checkpoint, if there is one."


def parse(config_class: type[C], argv: Sequence[str], doc: str | None, default_config: str | Path) -> C:
    """Reads a config from the default file, then ``--config``, then ``--key value``, each over the one before.

    Args:
        config_class: A dataclass; the "Attributes" of its docstring are the help of its keys. Its ``__post_init__``
            may raise a ``ValueError`` for a value that is out of range. If its key ``smoke`` comes out true, the
            values of its class attribute ``SMOKE`` go between the files and the command line, and ``output_dir`` gets a
            name of its own unless it is given there.
        argv: The command line without the program's name. A bare ``--flag`` means ``--flag true``; ``--config`` takes
            a YAML file, or the name of one beside the default config.
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

    default_config = Path(default_config)
    hints = {key: hint for key, hint in typing.get_type_hints(config_class).items() if key != "SMOKE"}
    helps = {p.arg_name: p.description for p in docstring_parser.parse(config_class.__doc__ or "").params}
    parser = jsonargparse.ArgumentParser(
        prog=f"sadam run {default_config.stem}",
        description=doc,
        formatter_class=Formatter,
        default_config_files=[str(default_config)],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file over the default config, or the name of one.")
    for key, hint in hints.items():
        parser.add_argument(f"--{key}", type=hint, help=helps.get(key))
    files, words = _split(argv, default_config, [f"--{key}" for key, hint in hints.items() if hint is bool])
    try:
        values = parser.parse_args([*files, *words]).as_dict()
        if values.get("smoke"):
            smoke = [f"--{key}={json.dumps(value)}" for key, value in getattr(config_class, "SMOKE", {}).items()]
            values = parser.parse_args([*files, *smoke, *words]).as_dict()
            if not any(word.startswith("--output_dir") for word in words):
                values["output_dir"] += "_smoke"  # it does not take the place of the run that it tries out
        if missing := [k for k, hint in hints.items() if values[k] is None and type(None) not in typing.get_args(hint)]:
            raise RecipeError(f"no value for {', '.join(missing)}: give it, or --config FILE with every key")
        for key, value in values.items():
            if value == "":
                raise RecipeError(f"{key}: it is empty, which is not a value; null means none")
            if isinstance(value, str) and "\0" in value:
                raise RecipeError(f"{key}: {value!r}: it has a character that no name has, a NUL: remove it")
            if isinstance(value, str) and value.startswith("~"):
                values[key] = os.path.expanduser(value)
        if twice := [key for key in values.get("optimizer_args") or {} if key in hints]:
            raise RecipeError(f"optimizer_args.{twice[0]}: it has a key of its own, --{twice[0]}")
        return config_class(**{key: values[key] for key in hints})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise RecipeError(_one_line(str(error), hints)) from None


def _split(argv: Sequence[str], default_config: Path, flags: list[str]) -> tuple[list[str], list[str]]:
    """Takes the ``--config FILE``s out of a command line, names made paths, and completes the bare flags."""
    named = {path.stem: path for path in config_files(default_config)}
    files, words, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            word = f"--config={rest.pop(0)}"
        if word.startswith("--config="):
            file = Path(word.partition("=")[2])
            file = file if os.path.isfile(file) else named.get(str(file), file)
            if not os.path.isfile(file):  # False, too, for a name that is too long
                raise RecipeError(f"config: {str(file)!r} is neither a file nor one of {', '.join(named)}")
            if _holds_keys(file):
                files.append(f"--config={file}")
        elif word in flags and (not rest or rest[0].startswith("-")):
            words.append(f"{word}=true")
        else:
            words.append(word)
    return files, words


def _holds_keys(file: Path) -> bool:
    """Whether a config has keys: it may be empty, or comments alone."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"config: {file} is not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        short = reprlib.Repr()
        short.maxlevel = 2  # what refers to itself, or to much more than itself, is said in a line
        raise RecipeError(f"config: {file} holds {short.repr(content)}, not keys with values such as lr: 1e-3")
    if content and "config" in content:
        raise RecipeError(f"config: {file} names a config of its own: give each with --config, the stronger one last")
    return content is not None


def config_files(default_config: Path) -> list[Path]:
    """Returns a recipe's configs, the default first.

    Args:
        default_config: The YAML file beside the recipe; the others begin with its name and an underscore.
    """
    others = sorted(default_config.parent.glob(f"{glob.escape(default_config.stem)}_*.yaml"))
    return [default_config, *others] if default_config.is_file() else others


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
        hint = ': pip install "sadam-integrations[recipes]"' if recipes_folder() in path.resolve().parents else ""
        raise RecipeError(f"{path.name} needs {error.name}, which is not installed{hint}") from None
    except (SyntaxError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError) and "null bytes" not in str(error):
            raise
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise RecipeError(f"{path}{where} is not Python: {str(error).splitlines()[0]}") from None
    if missing := [attribute for attribute in needed if not hasattr(module, attribute)]:
        raise RecipeError(f"{path} is not a recipe that can do this: it has no {', '.join(missing)}")
    return module


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


def check(config: Any, *rules: tuple[str, Callable[[Any], bool], str]) -> None:
    """Checks the ranges of a config's values: by the recipe's rules, and by those for the keys that recipes share.

    Args:
        config: The config, a dataclass.
        rules: For a key, what a valid value fulfils, as a function and in words. A whole number without a rule is at
            least 1, or null.

    Raises:
        ValueError: If a value is out of its range.
    """
    shared: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        *((key, lambda x: x >= 0, "at least 0") for key in ("lr", "weight_decay", "max_grad_norm")),
        ("seed", lambda n: 0 <= n < 2**32, "at least 0 and below 2**32"),
        ("layer_lr_decay", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("warmup_ratio", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    )
    rules = (*shared, *rules)
    numbers = {field.name for field in dataclasses.fields(config) if "int" in str(field.type)}
    sizes = sorted(numbers - {key for key, _, _ in rules})
    for key, valid, rule in (*rules, *((key, lambda n: n is None or n >= 1, "at least 1") for key in sizes)):
        if not valid(getattr(config, key)):
            raise ValueError(f"{key}: {getattr(config, key)} is not valid, it is {rule}")


def finish(
    folder: Path, recipe: str, title: str, config: Any, metrics: dict, history: dict, seconds: float
) -> dict[str, Any]:
    """Closes a run: draws the figures, writes ``result.json``, removes the checkpoints and says what came out.

    Args:
        folder: The run's folder.
        recipe: The recipe's name.
        title: What was trained, for the figure.
        config: The resolved config, a dataclass with ``optimizer`` and ``lr``.
        metrics: The final numbers, ``validation_accuracy`` among them.
        history: What :func:`sadam_integrations.plots.training_figure` draws.
        seconds: How long the run took, wall clock.

    Returns:
        What ``result.json`` holds.
    """
    summary = f"{config.optimizer} lr {config.lr:g}: validation accuracy {metrics['validation_accuracy']:.3f}"
    plots.training_figure(history, folder / "figure.png", f"{title}, {summary}")
    try:
        if lines := alr.Record.read(folder):
            plots.alr_figure(lines, folder / "alr.png", f"{title}, {config.optimizer} lr {config.lr:g}")
    except ValueError as error:  # a damaged record is no reason to lose the result
        say(f"no alr.png: {error}")
    result = write_result(folder, recipe, config, metrics, history, seconds)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not math.isfinite(metrics.get("validation_loss", 0.0)):
        summary += " (diverged: the validation loss is not a number)"
    tested = f", test {metrics['test_accuracy']:.3f}" if "test_accuracy" in metrics else ""
    say(f"{summary}{tested}, {seconds:.0f} s -> {folder}")
    return result


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
