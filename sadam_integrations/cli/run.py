"""``sadam run``: one recipe, in this process or in several through torchrun."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys

from sadam_integrations.cli.recipes import find
from sadam_integrations.recipe import interrupted, load
from sadam_integrations.run_folder import RecipeError

SUMMARY = "run a recipe"
DESCRIPTION = """\
Runs a recipe. Its folder then holds result.json, figure.png, config.yaml, log.txt and recipe.py, its source.

  sadam run bert                             the default config
  sadam run bert --help                      every key, with its default
  sadam run bert --smoke                     the default config in seconds, offline
  sadam run bert --lr 1e-4 --seed 1 --output_dir runs/seed1
  sadam run vit --config vit_cifar10         another config of the recipe, or a YAML file of yours
  sadam run vit --nproc 4                    four processes, one a GPU
  sadam run ./mine.py                        a recipe of your own; sadam cp makes one

A run that was stopped goes on when the same command is given again.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--nproc", type=int, metavar="N", help="number of processes on this machine, by torchrun")
    parser.add_argument("recipe", metavar="RECIPE", help="a name that sadam ls shows, or a Python file")
    keys = parser.add_argument(
        "keys", nargs=argparse.REMAINDER, metavar="--key value", help="RECIPE --help explains them"
    )
    keys.required = False


def go(args: argparse.Namespace) -> int:
    """Runs the recipe and returns its exit code."""
    path = find(args.recipe)
    parser = argparse.ArgumentParser(prog="sadam run", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=args.nproc)
    own, keys = parser.parse_known_args(args.keys)
    if own.nproc is None or "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_launcher()
        return load(path, "main").main(keys)
    if own.nproc < 1:
        raise RecipeError(f"--nproc: {own.nproc} is not valid, it is at least 1")
    return torchrun(own.nproc, ["-m", "sadam_integrations", "run", str(path), *keys])


def end_with_launcher() -> None:
    """Has Linux kill this process when torchrun, which started it, is killed: it would train on in a locked folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # 1 is PR_SET_PDEATHSIG


def torchrun(processes: int, words: list[str]) -> int:
    """Runs a command in several processes of this machine.

    Args:
        processes: Their number.
        words: What would follow ``python``.

    Returns:
        The exit code of the first process that failed, 130 after an interrupt, else 0.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, without its warning
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the recipe says what is wrong
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={processes}", *words]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException:
        print(interrupted(any(word.startswith("--overwrite") for word in words)), file=sys.stderr)
        return 130
    return 0
