"""How the studies are run: their command line, several runs at a time, what is kept of them, tables."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _tasks
from _tasks import TASKS

from sadam_integrations import recipe
from sadam_integrations.arguments import did_you_mean
from sadam_integrations.run_folder import hardware, lock, versions, write_json, write_text


def parser(name: str, doc: str | None, default: Sequence[str] = TASKS) -> argparse.ArgumentParser:
    """The command line that the studies share; ``tasks`` are the ones to run, ``scale`` is one of three."""
    made = argparse.ArgumentParser(
        prog=f"sadam run studies/{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = f"{', '.join(TASKS)} (default: {', '.join(default)}); the tables and the figure are of these"
    made.add_argument("tasks", nargs="*", type=known, default=list(default), metavar="TASK", help=help)
    made.add_argument("--output_dir", type=Path, default=Path("runs") / name, help=f"where to (default: runs/{name})")
    made.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    scale = made.add_mutually_exclusive_group()
    scale.add_argument(
        "--smoke", action="store_const", const="smoke", dest="scale", help="see in minutes that it works"
    )
    scale.add_argument("--full", action="store_const", const="full", dest="scale", help="the full setting, for a GPU")
    made.set_defaults(scale="default")
    return made


def known(task: str) -> str:
    """Checks a task's name."""
    if task not in TASKS:
        raise argparse.ArgumentTypeError(f"there is no task {task!r}{did_you_mean(task, TASKS)}")
    return task


def place(arguments: argparse.Namespace) -> Path:
    """The folder of a study: a smoke run or a full one does not get into the default's."""
    return arguments.output_dir / ("" if arguments.scale == "default" else arguments.scale)


class Runs:
    """The finished runs of a study, a line each in ``runs.jsonl``; what is missing is made, several at a time.

    Args:
        folder: Where the file is.
        workers: Runs at a time, each a process with one thread.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        recipe.require("transformers", "datasets", "matplotlib", "joblib", "tqdm", extra="studies")
        if workers < 1:
            raise recipe.RecipeError(f"--workers: {workers} is not valid, it is at least 1")
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        self.path, self.workers = folder / "runs.jsonl", workers
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line cut short by a crash is not a run
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        self.used: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        for row in map(json.loads, whole.splitlines()):
            self.rows[key(row["job"])] = row

    def __call__(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns the rows of these jobs, ``{**result, "job": job}``, in their order."""
        from joblib import Parallel, delayed
        from tqdm.auto import tqdm

        self.used |= {key(job) for job in jobs}
        todo = [job for job in jobs if key(job) not in self.rows]
        rows: Iterable[Any] = Parallel(n_jobs=self.workers, return_as="generator_unordered")(
            delayed(train_job)(job) for job in todo
        )
        for row in tqdm(rows, total=len(todo), unit="run", disable=not todo):
            with self.path.open("a", encoding="utf-8") as file:
                print(json.dumps(row), file=file)
            self.rows[key(row["job"])] = row
        return [self.rows[key(job)] for job in jobs]


def train_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """A run with the job that it is the result of."""
    return {"job": dict(job), **_tasks.train(job)}


def key(job: Mapping[str, Any]) -> str:
    """What tells jobs apart."""
    return json.dumps(job, sort_keys=True)


def finish(folder: Path, name: str, summary: Any, text: str, runs: Runs, scale: str) -> None:
    """Writes what the docs show: the summary with what it was made on as JSON, and the tables as Markdown."""
    seconds = round(sum(runs.rows[job]["seconds"] for job in runs.used))
    about = {"study": name, "scale": scale, "compute_seconds": seconds, "versions": versions(), "hardware": hardware()}
    write_json(folder / f"{name}.json", {**about, "summary": summary})
    write_text(folder / f"{name}.md", text + "\n")


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of one number from each seed, with their count; NaN where a run diverged."""
    whole = all(map(math.isfinite, values))
    deviation = statistics.stdev(values) if whole and len(values) > 1 else math.nan
    return {"mean": statistics.mean(values) if whole else math.nan, "sd": deviation, "runs": len(values)}


def shown(found: Mapping[str, Any], digits: int = 3) -> str:
    """A mean with its deviation."""
    if math.isnan(found["mean"]):
        return "diverged"
    deviation = "" if math.isnan(found["sd"]) else f" ± {found['sd']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{deviation}"


def markdown(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, the first row its head."""
    for i, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if i == 0:
            yield f"|{' --- |' * len(row)}"
