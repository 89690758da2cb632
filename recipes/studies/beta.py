"""How beta="auto" compares with AdamW, setting by setting, on the bundled BERT task and a small ViT.

    sadam run studies/beta            # everything: about three hours on one core
    sadam run studies/beta vit        # one of the two tasks
    sadam run studies/beta --smoke    # one seed and a short training each, in minutes

Every finished run is a line of runs/beta/<task>.jsonl; a study that was stopped goes on where it was. The tables and
the figure are those of docs/beta.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from sadam_integrations import backends, calibration, plots, recipe, update
from sadam_integrations.factory import OPTIMIZERS
from sadam_integrations.param_groups import param_groups

SEEDS = range(5)
LEARNING_RATES = {"bert": (5e-5, 2e-4), "vit": (1e-3, 2e-3)}


def mean_live(pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of the entries above zero, a 0-dim tensor: what the root mean square of sqrt(v) is made from."""
    v = torch.cat([piece.flatten() for piece in pieces])
    return v.double().sum() / (v > 0).sum().clamp(min=1)


@dataclass(frozen=True)
class Candidate:
    """One rule for the denominator: ``kind`` is its shape, the floor is ``floor`` times a statistic of sqrt(v)."""

    name: str
    kind: str = "softplus"
    optimizer: str = "sadamw"
    weight_decay: float = 0.01
    floor: float = calibration.FLOOR
    quantile: float | None = calibration.QUANTILE  # None: the root mean square
    gain: float = calibration.GAIN

    @contextlib.contextmanager
    def rule(self):
        """Makes beta="auto" follow this candidate."""
        with contextlib.ExitStack() as stack:
            patch = lambda where, name, new: stack.enter_context(mock.patch.object(where, name, new))  # noqa: E731
            patch(calibration, "FLOOR", self.floor)
            patch(calibration, "GAIN", self.gain)
            if self.quantile is None:
                patch(calibration, "histogram", mean_live)
                patch(calibration, "_quantile", lambda mean: mean)
            else:
                patch(calibration, "QUANTILE", self.quantile)
            if self.kind == "relative epsilon":
                patch(update, "softplus", lambda x, beta: x + update.LN2 / beta)
            patch(backends, "pick", lambda params, group: backends.for_loop)  # a kernel has its own softplus
            yield


ADAMW = Candidate("AdamW", kind="adamw", optimizer="adamw")
SHIPPED = calibration.FLOOR
CANDIDATES = {
    "bert": [
        ADAMW,
        Candidate(f"Sadam (auto), floor {SHIPPED:g}"),
        Candidate(f"floor {SHIPPED:g}, gain 1", gain=1.0),
        Candidate(f"AdamW, relative epsilon {SHIPPED:g}", kind="relative epsilon", gain=1.0),
        *(Candidate(f"Sadam (auto), floor {SHIPPED * k:g}", floor=SHIPPED * k) for k in (0.5, 2)),
        Candidate("by name: samsgradw", optimizer="samsgradw"),
        Candidate("by name: sadam, no weight decay", optimizer="sadam", weight_decay=0.0),
        Candidate("by name: samsgrad, no weight decay", optimizer="samsgrad", weight_decay=0.0),
        Candidate("by name: sadam, weight decay 0.01", optimizer="sadam"),
    ],
    "vit": [
        ADAMW,
        Candidate(f"Sadam (auto), floor {SHIPPED:g}"),
        Candidate(f"floor {SHIPPED:g}, gain 1", gain=1.0),
        Candidate(f"AdamW, relative epsilon {SHIPPED:g}", kind="relative epsilon", gain=1.0),
        *(Candidate(f"Sadam (auto), floor {SHIPPED * k:g}", floor=SHIPPED * k) for k in (0.25, 0.5, 2, 4)),
        *(
            Candidate(f"AdamW, relative epsilon {SHIPPED * k:g}", kind="relative epsilon", floor=SHIPPED * k, gain=1.0)
            for k in (0.5, 2)
        ),
        Candidate("AdamW, relative epsilon 2, gain 1.5", kind="relative epsilon"),
        Candidate("0.9 of the root mean square", floor=0.9, quantile=None),
        Candidate("2.5 of the tenth percentile", floor=2.5, quantile=0.1),
        Candidate("1.3 of the median", floor=1.3, quantile=0.5),
    ],
}


def spread(optimizer: torch.optim.Optimizer, rule: Candidate) -> tuple[float, float]:
    """q99/q01 of the adaptive learning rate over a tensor, median over the tensors of at least 100 live coordinates.

    Returns:
        The optimizer's own, and what AdamW's would be from the same second moments.
    """
    generator = torch.Generator().manual_seed(0)
    own, adam = [], []
    for group in optimizer.param_groups:
        for state in (optimizer.state[p] for p in group["params"]):
            v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            root = (v.flatten() / (1 - group["betas"][1] ** state["step"])).sqrt()
            root = root[root > 0]
            if root.numel() < 100:
                continue
            root = root[torch.randint(root.numel(), (min(root.numel(), 100_000),), generator=generator)]
            denominator = root + 1e-8 if rule.kind == "adamw" else update.softplus(root, state["beta"])
            for values, x in ((own, denominator), (adam, root)):
                low, high = torch.quantile(x, torch.tensor([0.01, 0.99])).tolist()
                values.append(high / low)
    return statistics.median(own), statistics.median(adam)


def vit(candidate: Candidate, lr: float, seed: int, smoke: bool) -> dict[str, float]:
    """A ViT of 139 thousand parameters from scratch on 4,000 Fashion-MNIST images, validated on another 1,000."""
    import numpy
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    data = numpy.load(Path(__file__).parents[1] / "data" / "fashion_mnist_6k.npz")
    images = (torch.tensor(data["x_train"]).float()[:, None] / 255 - 0.286) / 0.353
    labels = torch.tensor(data["y_train"]).long()
    train, held_out = slice(0, 4000), slice(4000, 5000)

    set_seed(seed)
    config = ViTConfig(
        image_size=28, num_channels=1, patch_size=7, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    cls = torch.optim.AdamW if candidate.kind == "adamw" else OPTIMIZERS[candidate.optimizer]
    optimizer = cls(param_groups(model), lr=lr, weight_decay=candidate.weight_decay)
    epochs, batch = (1 if smoke else 12), 64
    total = epochs * (4000 // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / total)))
    losses = []
    for _ in range(epochs):
        for index in torch.randperm(4000)[: 4000 // batch * batch].split(batch):
            loss = torch.nn.functional.cross_entropy(model(images[train][index]).logits, labels[train][index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        logits = model(images[held_out]).logits
    own, adam = spread(optimizer, candidate)
    return {
        "accuracy": (logits.argmax(1) == labels[held_out]).float().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, labels[held_out]).item(),
        "train_loss": statistics.mean(losses[-total // epochs :]),
        "spread": own,
        "adamw_spread": adam,
    }


def bert(candidate: Candidate, lr: float, seed: int, smoke: bool) -> dict[str, float]:
    """The BERT recipe's default, with this optimizer: 2,000 movie reviews, one epoch, the stock Trainer."""
    from transformers import TrainerCallback

    measured = []

    class Measure(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            measured.extend(spread(getattr(optimizer, "optimizer", optimizer), candidate))

    module = recipe.load(Path(__file__).parents[1] / "bert.py")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"optimizer": candidate.optimizer, "lr": lr, "seed": seed, "evaluations": 1, "test_split": "null"}
        settings |= {"weight_decay": candidate.weight_decay, "smoke": str(smoke).lower(), "output_dir": f"{folder}/run"}
        argv = [f"--{key}={value}" for key, value in settings.items()]
        config = recipe.parse(module.Config, argv, None, module.DEFAULT_CONFIG)
        result = module.run(config, callbacks=[Measure()])
    curve = result["history"]["train"]
    losses = [point["loss"] for point in curve if point["step"] > 0.75 * curve[-1]["step"]]
    return {
        "accuracy": result["metrics"]["validation_accuracy"],
        "loss": result["metrics"]["validation_loss"],
        "train_loss": statistics.mean(losses),
        "spread": measured[0],
        "adamw_spread": measured[1],
    }


TASKS = {"bert": bert, "vit": vit}


def study(tasks: list[str], folder: Path, smoke: bool) -> None:
    """Makes the runs that ``folder`` does not hold yet, then the tables and the figure from all it holds."""
    from tqdm.auto import tqdm

    torch.set_num_threads(1)
    folder = folder / "smoke" if smoke else folder
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        path = folder / f"{task}.jsonl"
        done = {(r["candidate"], r["lr"], r["seed"]) for r in read(path)}
        todo = [
            (candidate, lr, seed)
            for seed in (SEEDS[:1] if smoke else SEEDS)
            for candidate in CANDIDATES[task]
            for lr in LEARNING_RATES[task]
            if (candidate.name, lr, seed) not in done
        ]
        for candidate, lr, seed in tqdm(todo, desc=task, unit="run"):
            start = time.perf_counter()
            with candidate.rule():
                row = TASKS[task](candidate, lr, seed, smoke)
            seconds = round(time.perf_counter() - start, 1)
            with path.open("a") as file:
                print(
                    json.dumps({"candidate": candidate.name, "lr": lr, "seed": seed, **row, "seconds": seconds}),
                    file=file,
                )
    results = {task: read(folder / f"{task}.jsonl") for task in TASKS}
    for task, rows in results.items():
        print(table(task, rows))
    metrics = {"accuracy": "validation accuracy", "loss": "validation loss", "spread": "A-LR spread, q99/q01"}
    drawn = {task: points(task, rows) for task, rows in results.items() if rows}
    plots.settings_figure(drawn, metrics, folder / "beta.png")


def read(path: Path) -> list[dict]:
    """The finished runs of a file, none if it is not there; a last line cut short by a crash is dropped."""
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(task: str, rows: list[dict]) -> Iterator[tuple[Candidate, float, dict[str, list]]]:
    """Each candidate and learning rate that has runs, with a list of values, one a run, for each result."""
    for candidate in CANDIDATES[task]:
        for lr in LEARNING_RATES[task]:
            if runs := [row for row in rows if (row["candidate"], row["lr"]) == (candidate.name, lr)]:
                yield candidate, lr, {key: [run[key] for run in runs] for key in runs[0]}


def table(task: str, rows: list[dict]) -> str:
    """A Markdown table: means over the seeds with standard deviations."""
    heads = [task, "lr", "runs", "validation accuracy", "validation loss", "training loss", "spread", "Adam's / own"]
    lines = [heads, ["---"] * len(heads)]
    for candidate, lr, column in cells(task, rows):
        ratio = statistics.mean(a / b for a, b in zip(column["adamw_spread"], column["spread"], strict=True))
        shown = [mean(column[key]) for key in ("accuracy", "loss", "train_loss")]
        spread = f"{statistics.mean(column['spread']):.1f}"
        lines.append([candidate.name, f"{lr:g}", str(len(column["seed"])), *shown, spread, f"{ratio:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(task: str, rows: list[dict]) -> list[dict]:
    """What the figure shows: AdamW as a reference, and accuracy, loss and spread over the floor for the two shapes."""
    shown = []
    for candidate, lr, column in cells(task, rows):
        series = candidate.name.removesuffix(f" {candidate.floor:g}").removesuffix(", floor")
        if series in ("AdamW", "AdamW, relative epsilon", "Sadam (auto)"):
            setting = None if candidate.kind == "adamw" else candidate.floor
            shown.append({**column, "series": series, "lr": lr, "setting": setting})
    return shown


def mean(values: list[float]) -> str:
    """Mean and standard deviation, three digits; of one value, the value."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study from the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sadam run studies/beta", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tasks", nargs="*", default=list(TASKS), choices=[*TASKS], help="which tasks to run (default: all)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/beta"), help="where the runs and figures go")
    parser.add_argument("--smoke", action="store_true", help="one seed and a short training each, to see that it works")
    arguments = parser.parse_args(argv)
    study(arguments.tasks, arguments.output_dir, arguments.smoke)
    return 0


if __name__ == "__main__":
    sys.exit(main())
