"""``sadam compare``: a recipe with several optimizers, learning rates and seeds; or runs that exist, side by side."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sadam_integrations import alr, plots, recipe
from sadam_integrations.cli.recipes import find
from sadam_integrations.cli.tables import CHOICE, Run, curves, differences, notes, record, sentence, summarise, table
from sadam_integrations.factory import create_optimizer
from sadam_integrations.run_folder import NOT_COMPARED, RecipeError, lock, read_result, same_recipe, write_json

SUMMARY = "compare optimizers on a recipe, or runs that exist"
DESCRIPTION = """\
Runs a recipe with every optimizer at every learning rate, over the same seeds: the same budget for each. Prints means
with standard deviations and the paired differences to the first optimizer; compare.json and compare.png hold the rest,
compare_alr.png the adaptive learning rates of one seed.

  sadam compare bert --optimizers adamw sadamw --lrs 5e-5 2e-4 --seeds 5
  sadam compare vit --optimizers adamw sadamw sadamw:beta=1000 sgd:momentum=0.9 --epochs 4
  sadam compare vit --optimizers sadamw torch.optim.RMSprop --smoke
  sadam compare runs/bert runs/mine          runs that exist, overlaid

An optimizer is sadam, sadamw, samsgrad, samsgradw, torch's adam, adamw (both fused) or sgd, or a dotted path to any
other, then ":key=value,..." for its arguments. Other --key value pairs go to the recipe, for every run. The learning
rate is chosen by the mean validation accuracy, among the rates with the fewest failures. Stopped at any moment and
started again, the comparison goes on from where it was, and more optimizers, rates or seeds may be added; a run that
fails is reported at the end and tried again the next time. The runs' models are not kept.
"""

TAKEN = {"optimizer": "--optimizers", "optimizer_args": "--optimizers NAME:key=value", "lr": "--lrs", "seed": "--seeds"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("what", nargs="+", metavar="RECIPE | RUN", help="a recipe, or two and more folders of runs")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME[:key=value,...]", help="what to compare")
    parser.add_argument("--lrs", nargs="+", metavar="LR", help="learning rates for each (default: the config's)")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 for each (default: 3)")
    parser.add_argument("--output_dir", type=Path, help="where to (default: runs/compare/RECIPE, or runs/compare)")


def go(args: argparse.Namespace) -> int:
    """Makes or reads the runs, prints the table and writes the JSON and the figure; 1 if a run failed."""
    recipe.require("matplotlib", "yaml", "tqdm")
    overlay = (Path(args.what[0]) / "result.json").exists()
    runs, folder = existing(args) if overlay else planned(args)
    check_earlier(runs, folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    try:
        execute([run for run in runs if not run.result])
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    summary = summarise(runs)
    gaps = differences(runs, summary)
    finished = [run for run in runs if run.result]
    about = {
        "overrides": args.overrides,
        "summary": summary,
        "differences": gaps,
        "runs": [record(run) for run in runs],
    }
    if finished:
        first = finished[0].result or {}
        about = {**{key: first[key] for key in ("recipe", "versions", "hardware")}, **about}
    write_json(folder / "compare.json", about)
    if finished:
        title = about["recipe"] if overlay else f"{about['recipe']}: means over the seeds, with standard deviations"
        plots.compare_figure(curves(runs, summary), folder / "compare.png", title)
        rates = {row["optimizer"]: row["lr"] for row in summary if row["chosen"]}
        chosen = [run for run in finished if run.lr == rates[run.label]]
        measured: dict[str, Any] = {}
        for run in reversed(chosen):  # the first seed comes last and stays
            try:
                lines = alr.Record.read(run.folder)
            except ValueError as error:
                print(f"not in compare_alr.png: {error}", file=sys.stderr)
                continue
            if lines:
                measured[f"{run.label}, lr {run.lr:g}"] = lines
        if measured:
            measured = dict(reversed(measured.items()))
            title = about["recipe"] + ("" if overlay else ": first seed")
            plots.alr_compare_figure(measured, folder / "compare_alr.png", title)
        print(table(summary))
        for gap in gaps:
            print(sentence(gap))
        for line in notes([run.result for run in finished if run.result], overlay):
            print(line)
    print(f"{len(finished)} of {len(runs)} runs -> {folder}")
    for run in runs:
        if run.error:
            print(f"failed: {run.folder}: {run.error}", file=sys.stderr)
    return 0 if len(finished) == len(runs) else 1


def existing(args: argparse.Namespace) -> tuple[list[Run], Path]:
    """Reads runs that are finished."""
    if args.optimizers or args.lrs or args.seeds or args.overrides:
        raise RecipeError("runs that exist are compared as they are: leave --optimizers and all other keys out")
    runs = []
    for word in {str(Path(word).resolve()): word for word in args.what}.values():
        run = Run(word, math.nan, 0, Path(word), word)
        run.result = read_result(run.folder)
        run.lr, run.seed = float(run.result["config"]["lr"]), int(run.result["config"]["seed"])
        check_choice(run)
        runs.append(run)
    if len(kinds := {run.result["recipe"] for run in runs if run.result}) > 1:
        raise RecipeError(f"these are runs of different recipes, {', '.join(sorted(kinds))}: compare those of one")
    return runs, args.output_dir or Path("runs/compare")


def planned(args: argparse.Namespace) -> tuple[list[Run], Path]:
    """Works out every run of a comparison, and checks all of them before the first one starts."""
    if len(args.what) > 1:
        raise RecipeError(
            f"{args.what[0]} is not the folder of a finished run, and only one recipe is compared at a time"
        )
    path = find(args.what[0])
    if not args.optimizers:
        raise RecipeError("give --optimizers, such as --optimizers adamw sadamw")
    module = recipe.load(path, "Config", "DEFAULT_CONFIG")
    seeds = 3 if args.seeds is None else args.seeds
    if seeds < 1:
        raise RecipeError(f"--seeds: {seeds} is not valid, it is at least 1")
    for word in args.overrides:
        key = word.lstrip("-").partition("=")[0].partition(".")[0]
        if word.startswith("--") and key in TAKEN:
            raise RecipeError(f"--{key}: in a comparison this is {TAKEN[key]}")
        if word.startswith("--") and key in NOT_COMPARED:
            raise RecipeError(
                f"--{key}: each run of a comparison has a folder of its own; delete what is to be made anew"
            )
    base = parse(module, args.overrides)
    folder = args.output_dir or Path("runs/compare") / (path.stem + ("_smoke" if base.smoke else ""))
    code = path.read_text(encoding="utf-8")
    runs: dict[Path, Run] = {}
    for optimizer in args.optimizers:
        name, _, settings = optimizer.partition(":")
        given = [f"--optimizer={name}", f"--optimizer_args={json.dumps(optimizer_arguments(name, settings))}"]
        for lr in args.lrs or [repr(base.lr)]:
            for seed in range(seeds):
                words = [*args.overrides, *given, f"--lr={lr}", f"--seed={seed}"]
                config = parse(module, words)
                place = folder / f"{'-'.join(filter(None, (name, settings)))}-lr{config.lr!r}-seed{seed}"
                words = ["-m", "sadam_integrations", "run", str(path), *words, f"--output_dir={place}"]
                runs[place] = Run(optimizer, config.lr, seed, place, place.name, words, config, code)
    for run in runs.values():
        take(run)
    return list(runs.values()), folder


def parse(module: ModuleType, words: Sequence[str]) -> Any:
    """Returns the config that a recipe makes of a command line."""
    return recipe.parse(module.Config, words, None, module.DEFAULT_CONFIG)


def optimizer_arguments(name: str, settings: str) -> dict[str, Any]:
    """Reads ``key=value,...``, and tries the optimizer out on a single number."""
    import yaml

    given = {}
    source = f"--optimizers {name}{':' if settings else ''}{settings}"
    for item in filter(None, re.split(r",(?![^\[]*\])", settings)):  # not the commas of betas=[0.9,0.99]
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{source}: {item!r} is not of the form key=value")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"{source}: {value!r} is not a value") from None
    try:
        create_optimizer(name, [torch.zeros(1, 1, requires_grad=True)], **{"lr": 1e-3, **given})
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"{source}: {error}") from None
    return given


def check_choice(run: Run) -> None:
    """Raises if a result lacks what the learning rate is chosen by."""
    if run.result and CHOICE not in run.result["metrics"]:
        raise RecipeError(f"{run.folder}: result.json has no {CHOICE} among its metrics")


def check_earlier(runs: list[Run], folder: Path) -> None:
    """Raises if the folder holds a comparison with runs that are not among these."""
    try:
        earlier = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        others = {run["folder"] for run in earlier["runs"]} - {run.name for run in runs}
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{folder / 'compare.json'} is not a comparison: give another --output_dir") from None
    if others:
        raise RecipeError(
            f"{folder} holds a comparison with {min(others)}, which is not part of this one: "
            f"give another --output_dir, or delete {folder / 'compare.json'}"
        )


def take(run: Run) -> None:
    """Takes over the result of a run that is finished; one made with another config or recipe is an error."""
    import yaml

    config = None
    if (run.folder / "result.json").exists():
        run.result = read_result(run.folder)
        check_choice(run)
        config = run.result["config"]
    elif any(run.folder.glob("checkpoints/*")):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # the run itself says what is wrong
            config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        return
    fix = "give another --output_dir, or delete that folder"
    wanted = dataclasses.asdict(run.config)
    if different := [k for k in wanted if k not in NOT_COMPARED and config.get(k) != wanted[k]]:
        key = different[0]
        raise RecipeError(f"{run.folder} holds a run with {key}: {config.get(key)!r}, now it is {wanted[key]!r}: {fix}")
    if not same_recipe(run.folder, run.code):
        raise RecipeError(f"{run.folder} holds a run of another version of the recipe: {fix}")


def execute(runs: list[Run]) -> None:
    """Makes the runs that are not finished, each in a process of its own."""
    from tqdm.auto import tqdm

    with tqdm(runs, unit="run", disable=not runs) as bar:
        for run in bar:
            bar.set_description(f"{run.label} lr {run.lr:g} seed {run.seed}")
            run.folder.mkdir(parents=True, exist_ok=True)
            with (run.folder / ".child").open("w") as handle:
                hold(handle, lambda: bar.write(f"waiting for the process that still runs in {run.folder}"))  # noqa: B023
                take(run)
                if not run.result:
                    launch(run, handle.fileno())
            if run.result:
                shutil.rmtree(run.folder / "model", ignore_errors=True)  # hundreds of them fill a disk


def hold(handle: Any, wait: Any) -> None:
    """Locks a file, when no process started by another comparison holds it any more, where the system has locks."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)


def launch(run: Run, held: int) -> None:
    """Makes a run in a process that keeps the lock, whatever becomes of this one, and takes over its result."""
    log = run.folder / ".stderr"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(  # noqa: S603 -- a list of words, no shell; a session of its own: an interrupt of this process reaches it once, from here
            [sys.executable, *run.words],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            pass_fds=(held,) if os.name == "posix" else (),
        )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        if os.name == "posix":
            process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code == 0:
        take(run)
    if run.result:
        log.unlink()
        return
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code < 0:
        run.error = f"killed by signal {-code}"
    elif code == 0:
        run.error = "ended without a result.json"
    else:
        run.error = (told or lines or [f"exit code {code}"])[-1]
