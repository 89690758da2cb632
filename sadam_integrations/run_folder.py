"""A run's folder: made or gone on with, locked, logged into, and closed with result.json."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from sadam_integrations.version import __version__

RUN_FILES = (
    "result.json",
    "figure.png",
    "alr.jsonl",
    "alr.png",
    "step_speed.png",
    "model",
    "checkpoints",
    "config.yaml",
    "recipe.py",
    "log.txt",
)
"""What a run writes into its folder; ``result.json`` comes last, so that its presence means "finished"."""

LOCK = ".lock"
"""The file that is locked while a process is at work in a folder; it marks the folder as one of ours."""

NOT_COMPARED = ("output_dir", "overwrite")
"""Keys that may differ between an interrupted run and the one that continues it."""

logger = logging.getLogger(__name__)
logging.getLogger("sadam_integrations").addHandler(logging.NullHandler())


class RecipeError(Exception):
    """Something that the person who started the recipe can correct: shown as one line, without a stack trace."""


def is_main_process() -> bool:
    """Whether this is the process that writes files: the only one, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, file: Any = None) -> None:
    """Prints a line and writes it into the run's log; processes other than the main one do nothing.

    Args:
        text: The line.
        file: Where to, if not to standard output.
    """
    if is_main_process():
        logger.info(text.strip())
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more: no reason to stop a training
            print(text, file=file, flush=True)


def open_run(config: Any, source: str | Path) -> Path:
    """Makes a run's folder ready: a new run, or the continuation of an interrupted one with the same config.

    Only the main process touches the folder.

    Args:
        config: A dataclass with ``output_dir`` and ``overwrite``; it is written to ``config.yaml`` in the folder.
        source: The recipe's own file; it is copied to ``recipe.py`` in the folder.

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
    ours = (folder / LOCK).exists()
    if folder.is_dir() and not ours and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RecipeError(f"output_dir: {folder} holds files that are not a run's: give another --output_dir")
    code = Path(source).read_text(encoding="utf-8")  # it may be the copy in this very folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir: {folder} cannot be made: {error.strerror}") from None
    lock(folder)
    if config.overwrite:
        for name in RUN_FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif (folder / "result.json").exists():
        raise RecipeError(f"output_dir: {folder} holds a finished run: {fix}")
    interrupted = any(folder.glob("checkpoints/*"))
    if interrupted:
        try:
            before, now = dict(yaml.safe_load(saved.read_text(encoding="utf-8"))), dataclasses.asdict(config)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise RecipeError(f"output_dir: {saved} cannot be read ({error}): {fix}") from None
        if differing := [k for k in now if k not in NOT_COMPARED and before.get(k) != now[k]]:
            changes = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in differing)
            raise RecipeError(f"output_dir: {folder} holds an interrupted run with another config ({changes}): {fix}")
        if not same_recipe(folder, code):
            raise RecipeError(f"output_dir: {folder} holds an interrupted run of another version of the recipe: {fix}")
    else:
        (folder / "alr.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        write_text(saved, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        write_text(folder / "recipe.py", code)
    _open_log(folder / "log.txt", "a" if interrupted else "w")
    logger.info("%s on %s", versions(), hardware())
    return folder


def reason(error: BaseException) -> str:
    """Returns the first sentence of what a library says is wrong; of one that says nothing, the kind of error.

    Args:
        error: What it raised; where that has a cause, the cause says more.
    """
    error = error.__cause__ or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def not_written(error: Exception) -> str | None:
    """Returns what is wrong if a file could not be written, as on a full disk, and the error names no file; else None.

    Args:
        error: An OSError, or the errors of their own that torch and safetensors have for that.
    """
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG):
        return str(error.strerror)
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        return str(error).partition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "the disk may be full"
    return None


def _open_log(path: Path, mode: str) -> None:
    """Sends what this package and the libraries log, and warnings, to a file, until the next run's is opened."""
    handler = logging.FileHandler(path, mode, encoding="utf-8", errors="backslashreplace")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: what stops the run is said
    handler.addFilter(lambda line: line.levelno > logging.INFO or line.name.startswith("sadam_integrations"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("sadam_integrations").setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings = logging.getLogger("py.warnings")
    if not any(type(old) is logging.StreamHandler for old in warnings.handlers):
        warnings.addHandler(logging.StreamHandler())  # they are still seen
    for name in ("sadam_integrations", "transformers", "lightning.pytorch", "pytorch_lightning", "py.warnings"):
        for old in list(logging.getLogger(name).handlers):
            if type(old) is logging.FileHandler:
                logging.getLogger(name).removeHandler(old)
                old.close()
        logging.getLogger(name).addHandler(handler)


def lock(folder: Path) -> None:
    """Keeps other processes out of a folder until this one ends, however it ends; not on Windows.

    Args:
        folder: The folder of a run or a comparison.

    Raises:
        RecipeError: If another process is in it.
    """
    if str(folder) in _LOCKS:
        return
    handle = (folder / LOCK).open("w")
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise RecipeError(
                f"output_dir: another process is running in {folder}: give another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            logger.warning("%s cannot be locked: nothing keeps a second run out of it", folder)
    _LOCKS[str(folder)] = handle


_LOCKS: dict[str, Any] = {}


def same_recipe(folder: Path, code: str) -> bool:
    """Whether the run in a folder was made by this version of its recipe.

    Args:
        folder: The run's folder.
        code: The recipe's source now.
    """
    source = folder / "recipe.py"
    return source.is_file() and source.read_text(encoding="utf-8") == code


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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one go; a number that is not finite becomes null.

    Args:
        path: Where to.
        value: The content.
    """

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


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
    write_json(folder / "result.json", result)
    if handle := _LOCKS.pop(str(folder), None):
        handle.close()
    return result


def read_result(folder: Path) -> dict[str, Any]:
    """Returns the ``result.json`` of a finished run.

    Args:
        folder: The run's folder.

    Raises:
        RecipeError: If there is none, or it cannot be read.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise RecipeError(f"{folder} holds no finished run: {path} is missing")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        needed = ("recipe", "metrics", "history", "config", "versions", "hardware", "seconds")
        missing = [key for key in needed if key not in result]
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path} is not a run's result: {error}") from None
    if missing:
        raise RecipeError(f"{path} is not a run's result: it has no {', '.join(missing)}")
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
