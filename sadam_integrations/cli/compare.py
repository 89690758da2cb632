"""``sadam compare``: a recipe with several optimizers, learning rates and seeds; or runs that exist, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sadam_integrations import plots, recipe
from sadam_integrations.cli.recipes import find, load
from sadam_integrations.factory import create_optimizer
from sadam_integrations.run_folder import NOT_COMPARED, RecipeError, lock, read_result, wait_for, write_text

SUMMARY = "compare optimizers on a recipe, or runs that exist"
DESCRIPTION = """\
Runs a recipe with every optimizer at every learning rate, over the same seeds: the same budget for each. Prints means
with standard deviations and the paired differences to the first optimizer; compare.json and compare.png hold the rest.

  sadam compare bert --optimizers adamw sadamw --lrs 5e-5 2e-4 --seeds 5
  sadam compare vit --optimizers adamw sadamw sadamw:beta=1000 sgd:momentum=0.9 --epochs 4
  sadam compare vit --optimizers sadamw torch.optim.RMSprop --smoke
  sadam compare runs/bert runs/mine          runs that exist, overlaid

An optimizer is sadam, sadamw, samsgrad, samsgradw, torch's adam, adamw (both fused) or sgd, or a dotted path to any
other, then ":key=value,..." for its arguments. Other --key value pairs go to the recipe, for every run. The learning
rate is chosen by the mean validation accuracy. Stopped at any moment and started again, the comparison goes on from
where it was; a run that fails is reported at the end and tried again the next time. The runs' models are not kept.
"""

COLUMNS = {
    "validation_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "validation_loss": "validation loss",
}
CHOICE = next(iter(COLUMNS))
"""What the learning rate is chosen by."""

TAKEN = {"optimizer": "--optimizers", "optimizer_args": "--optimizers NAME:key=value", "lr": "--lrs", "seed": "--seeds"}


@dataclasses.dataclass
class Run:
    """One run of a comparison: what it is to be, and once it is finished what came out, or the error."""

    label: str
    lr: float
    seed: int
    folder: Path
    words: list[str] = dataclasses.field(default_factory=list)
    config: Any = None
    result: dict[str, Any] | None = None
    error: str | None = None


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("what", nargs="+", metavar="RECIPE | RUN", help="a recipe, or two and more folders of runs")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME[:key=value,...]", help="what to compare")
    parser.add_argument("--lrs", nargs="+", metavar="LR", help="learning rates for each (default: the config's)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 for each (default: 3)")
    parser.add_argument("--output_dir", type=Path, help="where to (default: runs/compare/RECIPE, or runs/compare)")


def go(args: argparse.Namespace) -> int:
    """Makes or reads the runs, prints the table and writes the figure and the JSON; 1 if a run failed."""
    recipe.require("matplotlib", "yaml", "tqdm")
    about: dict[str, Any] = {}
    if all((Path(word) / "config.yaml").is_file() for word in args.what):
        runs, folder = existing(args), args.output_dir or Path("runs/compare")
    else:
        runs, folder = planned(args)
        about["overrides"] = args.overrides
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    try:
        execute([run for run in runs if not run.result])
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    summary = summarise(runs)
    finished = [run for run in runs if run.result]
    if finished:
        about |= {key: finished[0].result[key] for key in ("recipe", "versions", "hardware")}  # type: ignore[index]
        title = f"{about['recipe']}: means over the seeds, with standard deviations"
        plots.compare_figure(curves(runs, summary), folder / "compare.png", title)
        print(table(summary))
        for line in differences(runs, summary):
            print(line)
    records = [record(run) for run in runs]
    write_text(folder / "compare.json", json.dumps({**about, "summary": summary, "runs": records}, indent=2) + "\n")
    print(f"{len(finished)} of {len(runs)} runs -> {folder}")
    for run in runs:
        if run.error:
            print(f"failed: {run.folder}: {run.error}", file=sys.stderr)
    return 0 if len(finished) == len(runs) else 1


def existing(args: argparse.Namespace) -> list[Run]:
    """Reads runs that are finished."""
    if args.optimizers or args.lrs or args.overrides:
        raise RecipeError("runs that exist are compared as they are: leave --optimizers and all other keys out")
    runs = []
    for word in args.what:
        result = read_result(Path(word))
        config = result["config"]
        runs.append(Run(word, float(config["lr"]), int(config["seed"]), Path(word), result=result))
    return runs


def planned(args: argparse.Namespace) -> tuple[list[Run], Path]:
    """Works out every run of a comparison, and checks all of them before the first one starts."""
    if len(args.what) > 1:
        raise RecipeError(f"{args.what[0]} is not the folder of a run, and only one recipe is compared at a time")
    path = find(args.what[0])
    module = load(path, "Config", "DEFAULT_CONFIG")
    if not args.optimizers:
        raise RecipeError("give --optimizers, such as --optimizers adamw sadamw")
    if args.seeds < 1:
        raise RecipeError(f"--seeds: {args.seeds} is not valid, it is at least 1")
    for word in args.overrides:
        key = word.lstrip("-").partition("=")[0].partition(".")[0]
        if word.startswith("--") and key in (*TAKEN, *NOT_COMPARED):
            raise RecipeError(f"--{key} is not for all runs: {TAKEN.get(key, 'each run has a folder of its own')}")
    folder = args.output_dir or Path("runs/compare") / path.stem
    rates = args.lrs or [str(parse(module, args.overrides).lr)]
    runs = []
    for optimizer in dict.fromkeys(args.optimizers):
        name, _, settings = optimizer.partition(":")
        given = [f"--optimizer={name}", f"--optimizer_args={json.dumps(optimizer_arguments(name, settings))}"]
        for lr in dict.fromkeys(rates):
            for seed in range(args.seeds):
                words = [*args.overrides, *given, f"--lr={lr}", f"--seed={seed}"]
                config = parse(module, words)
                place = folder / f"{'-'.join(filter(None, (name, settings)))}-lr{config.lr:g}-seed{seed}"
                words = ["-m", "sadam_integrations", "run", str(path), *words, f"--output_dir={place}"]
                runs.append(Run(optimizer, config.lr, seed, place, words, config))
    for run in runs:
        take(run)
    return runs, folder


def parse(module: ModuleType, words: Sequence[str]) -> Any:
    """Returns the config that a recipe makes of a command line."""
    return recipe.parse(module.Config, words, None, module.DEFAULT_CONFIG)


def optimizer_arguments(name: str, settings: str) -> dict[str, Any]:
    """Reads ``key=value,...``, and tries the optimizer out on a single number."""
    import yaml

    given = {}
    for item in filter(None, settings.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"--optimizers {name}:{settings}: {item!r} is not of the form key=value")
        given[key] = yaml.safe_load(value)
    try:
        create_optimizer(name, [torch.zeros(1, requires_grad=True)], lr=1e-3, **given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"--optimizers {name}{':' if settings else ''}{settings}: {error}") from None
    return given


def take(run: Run) -> None:
    """Takes over the result of a run that is finished; one made with another config is an error."""
    if not (run.folder / "result.json").exists():
        return
    result = read_result(run.folder)
    wanted = dataclasses.asdict(run.config)
    if different := [k for k in wanted if k not in NOT_COMPARED and result["config"].get(k) != wanted[k]]:
        key = different[0]
        raise RecipeError(
            f"{run.folder} holds a run with {key}: {result['config'].get(key)!r}, now it is {wanted[key]!r}: "
            f"give another --output_dir, or delete that folder"
        )
    run.result = result


def execute(runs: list[Run]) -> None:
    """Makes the runs that are not finished, each in a process of its own."""
    from tqdm.auto import tqdm

    with tqdm(runs, unit="run", disable=not runs) as bar:
        for run in bar:
            bar.set_description(f"{run.label} lr {run.lr:g} seed {run.seed}")
            wait_for(run.folder)  # a process that outlived the comparison that started it
            take(run)
            if run.result:
                continue
            process = subprocess.Popen(  # a session of its own: an interrupt of this process reaches it once, from here
                [sys.executable, *run.words],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, error = process.communicate()
            except KeyboardInterrupt:
                if os.name == "posix":
                    process.send_signal(signal.SIGINT)
                process.communicate()
                raise
            if process.returncode:
                lines = [line for line in error.splitlines() if line.strip()]
                told = [line for line in lines if line.startswith("error: ")]
                run.error = (told or lines or [f"exit code {process.returncode}"])[-1].removeprefix("error: ")
                continue
            take(run)
            shutil.rmtree(run.folder / "model", ignore_errors=True)  # hundreds of them fill a disk


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns a row for each optimizer and learning rate: means and deviations over the seeds."""
    rows: list[dict[str, Any]] = []
    for label, lr in dict.fromkeys((run.label, run.lr) for run in runs):
        metrics = [run.result["metrics"] for run in runs if run.result and (run.label, run.lr) == (label, lr)]
        if not metrics:
            continue
        row: dict[str, Any] = {"optimizer": label, "lr": lr, "runs": len(metrics)}
        for key in (key for key in COLUMNS if all(key in found for found in metrics)):
            values = [found[key] for found in metrics]
            row[key] = {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
        rows.append(row)
    for row in rows:
        own = [other for other in rows if other["optimizer"] == row["optimizer"]]
        row["chosen"] = row is max(own, key=lambda other: other[CHOICE]["mean"])
    return rows


def table(summary: list[dict[str, Any]]) -> str:
    """Returns the summary as a Markdown table; an asterisk marks the rate with the best mean validation accuracy."""
    shown = [key for key in COLUMNS if any(key in row for row in summary)]
    lines = [["optimizer", "lr", "runs", *(COLUMNS[key] for key in shown)]]
    for row in summary:
        mark = " *" if row["chosen"] and sum(r["optimizer"] == row["optimizer"] for r in summary) > 1 else ""
        cells = [_mean(row[key]["mean"], row[key]["sd"]) if key in row else "" for key in shown]
        lines.append([row["optimizer"], f"{row['lr']:g}{mark}", str(row["runs"]), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def differences(runs: list[Run], summary: list[dict[str, Any]]) -> Iterable[str]:
    """Yields a line for each other optimizer: its distance to the first one, seed by seed, each at its chosen rate."""
    chosen = {row["optimizer"]: row["lr"] for row in summary if row["chosen"]}
    found = {
        label: {run.seed: run.result["metrics"] for run in runs if run.result and (run.label, run.lr) == (label, lr)}
        for label, lr in chosen.items()
    }
    first, *others = found
    for label in others:
        seeds = found[first].keys() & found[label].keys()
        if len(seeds) < 2:
            continue
        parts = []
        for key in (key for key in COLUMNS if all(key in found[x][seed] for x in (first, label) for seed in seeds)):
            gaps = [found[label][seed][key] - found[first][seed][key] for seed in seeds]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            parts.append(f"{COLUMNS[key]} {statistics.mean(gaps):+.3f} ± {error:.3f}")
        yield f"{label} - {first}, {len(seeds)} seeds, mean difference ± standard error: {', '.join(parts)}"


def curves(runs: list[Run], summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the figure shows: of each optimizer and rate the histories and the final accuracies."""
    shown = []
    for row in summary:
        own = [run for run in runs if run.result and (run.label, run.lr) == (row["optimizer"], row["lr"])]
        histories = [run.result["history"] for run in own if run.result]
        values = [run.result["metrics"][CHOICE] for run in own if run.result]
        shown.append({"label": row["optimizer"], "lr": row["lr"], "chosen": row["chosen"], "final": values})
        shown[-1]["histories"] = histories
    return shown


def record(run: Run) -> dict[str, Any]:
    """Returns what compare.json holds of a run."""
    kept: dict[str, Any] = {"optimizer": run.label, "lr": run.lr, "seed": run.seed, "folder": run.folder.name}
    if run.result:
        return {**kept, "metrics": run.result["metrics"], "seconds": run.result["seconds"]}
    return {**kept, "error": run.error}


def _mean(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
