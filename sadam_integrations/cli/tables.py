"""What the runs of a comparison add up to: means, deviations, the chosen rates, paired differences, the table."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from sadam_integrations.run_folder import NOT_COMPARED

COLUMNS = {
    "validation_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "validation_loss": "validation loss",
}
CHOICE = next(iter(COLUMNS))
"""What the learning rate is chosen by."""


@dataclasses.dataclass
class Run:
    """One run of a comparison: what it is to be, and once it is finished what came out, or the error."""

    label: str
    lr: float
    seed: int
    folder: Path
    name: str
    words: list[str] = dataclasses.field(default_factory=list)
    config: Any = None
    code: str = ""
    result: dict[str, Any] | None = None
    error: str | None = None


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns a row for each optimizer and learning rate: means and deviations over the seeds."""
    rows: list[dict[str, Any]] = []
    for label, lr in dict.fromkeys((run.label, run.lr) for run in runs):
        metrics = [run.result["metrics"] for run in runs if run.result and (run.label, run.lr) == (label, lr)]
        if metrics:
            means = {k: statistics_of([found[k] for found in metrics], "sd") for k in COLUMNS if k in metrics[0]}
            rows.append({"optimizer": label, "lr": lr, "runs": len(metrics), **means})
    for row in rows:
        own = [other for other in rows if other["optimizer"] == row["optimizer"]]
        row["chosen"] = row is max(own, key=lambda other: (other["runs"], number(other[CHOICE]["mean"], -math.inf)))
    return rows


def statistics_of(values: list[float | None], spread: str) -> dict[str, float]:
    """Returns the mean, and under ``spread`` the deviation (sd) or the standard error (se); NaN if a value is none."""
    numbers = [number(value, math.nan) for value in values]
    if not all(map(math.isfinite, numbers)):
        return {"mean": math.nan, spread: math.nan}
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return {"mean": statistics.mean(numbers), spread: deviation / (len(numbers) ** 0.5 if spread == "se" else 1)}


def number(value: float | None, instead: float) -> float:
    """Returns a number, or ``instead`` for what is none: result.json has null for NaN."""
    return instead if value is None or math.isnan(value) else value


def table(summary: list[dict[str, Any]]) -> str:
    """Returns the summary as a Markdown table; an asterisk marks the rate that is chosen, where there are several."""
    shown = [key for key in COLUMNS if any(key in row for row in summary)]
    lines = [["optimizer", "lr", "runs", *(COLUMNS[key] for key in shown)]]
    for row in summary:
        mark = " *" if row["chosen"] and sum(r["optimizer"] == row["optimizer"] for r in summary) > 1 else ""
        cells = [cell(**row[key]) if key in row else "" for key in shown]
        lines.append([row["optimizer"], f"{row['lr']:g}{mark}", str(row["runs"]), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def cell(mean: float, sd: float) -> str:
    """Returns a mean with its deviation, if there is one."""
    return f"{mean:.3f}" + ("" if math.isnan(sd) else f" ± {sd:.3f}")


def differences(runs: list[Run], summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the distance of each other optimizer to the first one, seed by seed, each at its chosen rate."""
    chosen = {row["optimizer"]: row["lr"] for row in summary if row["chosen"]}
    found = {
        label: {run.seed: run.result["metrics"] for run in runs if run.result and (run.label, run.lr) == (label, lr)}
        for label, lr in chosen.items()
    }
    gaps = []
    for reference, label in [(next(iter(found)), label) for label in list(found)[1:]]:
        pairs = [(found[label][seed], found[reference][seed]) for seed in found[label].keys() & found[reference].keys()]
        if len(pairs) > 1:
            gap: dict[str, Any] = {"optimizer": label, "reference": reference, "seeds": len(pairs)}
            for key in (key for key in COLUMNS if all(key in metrics for pair in pairs for metrics in pair)):
                values = [number(own[key], math.nan) - number(other[key], math.nan) for own, other in pairs]
                gap[key] = statistics_of(list(values), "se")
            gaps.append(gap)
    return gaps


def sentence(gap: dict[str, Any]) -> str:
    """Returns a difference in words."""
    shown = ", ".join(f"{name} {gap[k]['mean']:+.3f} ± {gap[k]['se']:.3f}" for k, name in COLUMNS.items() if k in gap)
    pair = f"{gap['optimizer']} - {gap['reference']}"
    return f"{pair}, {gap['seeds']} seeds, mean difference ± standard error: {shown}"


def notes(results: list[dict[str, Any]], overlay: bool) -> list[str]:
    """Returns what has to be known of runs that were not made alike."""
    keys = [k for k in results[0]["config"] if k not in NOT_COMPARED and differ([r["config"].get(k) for r in results])]
    lines = [f"The runs differ in {', '.join(keys)}."] if overlay and keys else []
    if versions := [k for k in results[0]["versions"] if differ([r["versions"].get(k) for r in results])]:
        lines.append(f"The runs were made with different versions of {', '.join(versions)}.")
    return lines


def differ(values: list[Any]) -> bool:
    """Whether the values are not all the same."""
    return any(value != values[0] for value in values)


def curves(runs: list[Run], summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the figure shows: of each optimizer and rate the histories and the final accuracies."""
    shown = []
    for row in summary:
        results = [run.result for run in runs if run.result and (run.label, run.lr) == (row["optimizer"], row["lr"])]
        final = [result["metrics"][CHOICE] for result in results]
        entry = {"label": row["optimizer"], "lr": row["lr"], "chosen": row["chosen"], "final": final}
        shown.append({**entry, "histories": [result["history"] for result in results]})
    return shown


def record(run: Run) -> dict[str, Any]:
    """Returns what compare.json holds of a run."""
    kept: dict[str, Any] = {"optimizer": run.label, "lr": run.lr, "seed": run.seed, "folder": run.name}
    if run.result:
        return {**kept, "metrics": run.result["metrics"], "seconds": run.result["seconds"]}
    return {**kept, "error": run.error}
