"""The studies of the paper's questions: the same trials for each, resumable, and every row made of the right runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from sadam_integrations import recipe
from sadam_integrations.factory import create_optimizer
from sadam_integrations.update import LN2

FOLDER = Path(__file__).parents[1] / "recipes" / "studies"
COMPARISON, EPSILON, ANISOTROPY = (
    recipe.load(FOLDER / f"{name}.py") for name in ("comparison", "epsilon", "anisotropy")
)
STUDY, TASKS = sys.modules["_study"], sys.modules["_tasks"]


@pytest.fixture
def made(monkeypatch):
    """Instead of training, runs whose accuracy is best at a learning rate of 0.003; the list of the jobs made."""
    jobs = []

    def train(job):
        jobs.append(job)
        accuracy = 0.9 - abs(math.log10(job["lr"] / 3e-3)) / 10 + job["seed"] / 500
        row = {"train_loss": 0.1, "steps": 10, "validation_accuracy": accuracy, "validation_loss": 0.4, "seconds": 2.0}
        if job.get("test"):
            row |= {"test_accuracy": accuracy - 0.01, "test_loss": 0.5}
        if "measure" in job:
            keys = ("min", "q01", "q25", "median", "q75", "q99", "max", "q99_over_q01", "floor_share")
            line = {"all": {key: 10.0**i for i, key in enumerate(keys)} | {"floor_share": 0.5}, "tensor_spread": 8.0}
            row["lines"] = [{"step": step, **line} for step in (1, 10)]
        return row

    monkeypatch.setattr(TASKS, "train", train)
    return jobs


def run(study, tmp_path, *words):
    return study.main([*words, "--workers", "1", "--output_dir", str(tmp_path)])


def test_the_comparison_tunes_every_method_with_the_same_number_of_trials(made, tmp_path, capsys):
    assert run(COMPARISON, tmp_path) == 0
    for task in TASKS.TASKS:
        for name, (optimizer, args) in COMPARISON.METHODS.items():
            own = [job for job in made if (job["task"], job["optimizer"], job["args"]) == (task, optimizer, args)]
            trials = [job["lr"] for job in own if job["seed"] == 0]
            assert trials == COMPARISON.rates(task, name) and len(trials) == 4
            assert all(job["seed"] == 0 or job["test"] for job in own), "the test split is for the chosen rate alone"
            best = min(trials, key=lambda lr: abs(math.log10(lr / 3e-3)))
            assert [(job["lr"], job["seed"]) for job in own if job["seed"]] == [(best, seed) for seed in (1, 2, 3)]
    assert "| Sadam (published) | 0.01 (edge) | 84.2 ± 0.2 | 0.500 ± 0.000 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["compute_seconds"] == 2 * len(made) and found["scale"] == "default"
    adam = next(row for row in found["summary"]["cnn"] if row["method"] == "Adam")
    assert adam["lr"] == 3e-3 and not adam["at_edge"] and adam["test_accuracy"]["mean"] == pytest.approx(0.894)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert (tmp_path / "comparison.md").read_text().count("\n| S") == 3 * 6


def test_the_papers_learning_rates_are_among_the_trials():
    published = {"S-Momentum": 0.1, "Adam": 1e-3, "AMSGrad": 1e-3, "PAdam": 0.1, "Yogi": 1e-2, "AdaBound": 1e-2}
    for name, lr in {**published, "AMSBound": 1e-2, "Sadam (published)": 1e-2, "SAMSGrad (published)": 1e-2}.items():
        assert lr in COMPARISON.rates("cnn", name)


@pytest.mark.parametrize("name", COMPARISON.METHODS)
def test_every_method_trains(name):
    optimizer, args = COMPARISON.METHODS[name]
    p = torch.nn.Parameter(torch.ones(4))
    made = create_optimizer(optimizer, [p], **{"lr": 0.1, "weight_decay": 5e-4, **args})
    for _ in range(3):
        p.grad = p.detach().clone()
        made.step()
    assert (p < 1).all() and torch.isfinite(p).all()


def test_a_study_goes_on_where_it_was_stopped(made, tmp_path):
    run(EPSILON, tmp_path, "cnn")
    first = len(made)
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:30])  # killed while it wrote
    run(EPSILON, tmp_path, "cnn")
    assert len(made) == first + 2 and len(path.read_text().splitlines()) == first
    run(EPSILON, tmp_path, "cnn", "bert")
    assert len(made) == 2 * first + 2
    assert set(json.loads((tmp_path / "epsilon.json").read_text())["summary"]) == {"cnn", "bert"}


def test_epsilon_and_beta_set_the_same_floors(made, tmp_path, capsys):
    run(EPSILON, tmp_path, "cnn", "bert")
    floors = [1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1]
    for task in ("cnn", "bert"):
        own = [job for job in made if job["task"] == task and job["seed"] == 0]
        for lr in EPSILON.RATES[task]:
            args = [job["args"] for job in own if job["lr"] == lr]
            assert [a["eps"] for a in args if "eps" in a] == pytest.approx(floors)
            assert [LN2 / a["beta"] for a in args if "beta" in a] == pytest.approx(floors)
        assert [job["lr"] for job in own if not job["args"]] == [EPSILON.RATES[task][0]]
    out = capsys.readouterr().out
    head = "| cnn: smallest denominator | beta | Adam, lr 0.001 | Adam, lr 0.01 | Sadam, lr 0.001 | Sadam, lr 0.01 |"
    assert head in out
    assert "| 1e-08 | 6.93e+07 | 0.853 ± 0.001 | 0.849 ± 0.001 | 0.853 ± 0.001 | 0.849 ± 0.001 |" in out
    assert (tmp_path / "epsilon.png").stat().st_size > 10_000


def test_a_diverged_run_is_said_and_the_study_ends(made, tmp_path, capsys, monkeypatch):
    train = TASKS.train

    def diverging(job):
        return train(job) | ({"train_loss": math.nan, "test_loss": math.inf} if job["optimizer"] == "sgd" else {})

    monkeypatch.setattr(TASKS, "train", diverging)
    run(COMPARISON, tmp_path, "vit")
    assert "| S-Momentum | 0.01 (edge) | 84.2 ± 0.2 | diverged | diverged |" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["summary"]["vit"][0]["train_loss"]["mean"] is None


def test_anisotropy(made, tmp_path, capsys):
    run(ANISOTROPY, tmp_path, "vit", "bert")
    assert {(job["task"], job["seed"]) for job in made} == {(t, s) for t in ("vit", "bert") for s in (0, 1)}
    assert (
        "| vit | Adam | 0.001 | 0.853 ± 0.001 | 1e+03 | 1 | 1e+06 | 1e+06 | 1e+07 | 8 | 50% |"
        in capsys.readouterr().out
    )
    assert (tmp_path / "anisotropy.png").stat().st_size > 10_000


def test_what_is_wrong_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run(EPSILON, tmp_path, "cnnn")
    assert exit.value.code == 2 and "there is no task 'cnnn' (did you mean cnn?)" in capsys.readouterr().err
    with pytest.raises(recipe.RecipeError, match="--workers: 0 is not valid"):
        EPSILON.main(["--workers", "0", "--output_dir", str(tmp_path)])


def test_the_network_is_he_et_als():
    model = TASKS.ResNet20(3)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [m.stride[0] for m in model.modules() if isinstance(m, torch.nn.Conv2d)].count(2) == 2


@pytest.mark.parametrize("task", ["cnn", "vit"])
def test_a_run_is_a_function_of_its_job_and_measuring_changes_nothing(task, monkeypatch):
    small = TASKS.Setting(1, 32, 128, 64, TASKS.cosine, 0.0)
    monkeypatch.setitem(TASKS.SETTINGS, (task, "smoke"), small)
    TASKS.read.cache_clear()
    job = {"task": task, "scale": "smoke", "optimizer": "sadam", "args": {}, "lr": 1e-3, "seed": 1, "test": True}
    plain, measured, other = (TASKS.train(job | more) for more in ({}, {"measure": 3}, {"seed": 2}))
    TASKS.read.cache_clear()
    lines = measured.pop("lines")
    for row in (plain, measured, other):
        del row["seconds"]
    assert plain == measured != other
    assert plain["steps"] == 4 and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["all"]["min"] <= line["all"]["median"] <= line["all"]["max"] for line in lines)


def test_splits_share_no_image():
    TASKS.read.cache_clear()
    splits, batch = TASKS.read("vit", "default")
    assert {split: len(y) for split, (_, y) in splits.items()} == {"train": 4000, "validation": 1000, "test": 1000}
    train, held = (splits[split][0].flatten(1) for split in ("train", "validation"))
    assert not any((train == image).all(1).any() for image in held[:50])
    assert batch(splits["train"][0], torch.tensor([3, 5]), True)[0].shape == (2, 1, 28, 28)
    assert TASKS.read("cnn", "default")[0]["train"][0].shape == (4000, 1, 14, 14)
    TASKS.read.cache_clear()


def test_a_run_that_diverges_ends_early():
    small = TASKS.SETTINGS["cnn", "smoke"]._replace(train=512, evaluate=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS.SETTINGS, ("cnn", "smoke"), small)
        TASKS.read.cache_clear()
        row = TASKS.train(
            {"task": "cnn", "scale": "smoke", "optimizer": "sgd", "args": {"momentum": 0.9}, "lr": 1e20, "seed": 0}
        )
        TASKS.read.cache_clear()
    assert row["steps"] < 8 and math.isnan(row["train_loss"]) and 0 <= row["validation_accuracy"] < 0.5


def test_schedules():
    assert [TASKS.tenths(part) for part in (0, 0.49, 0.5, 0.74, 0.75)] == [1, 1, 0.1, 0.1, 0.01]
    assert TASKS.cosine(0) == 1 and TASKS.cosine(1) == pytest.approx(0) and TASKS.linear(0.25) == 0.75


@pytest.mark.slow
@pytest.mark.parametrize("study", [COMPARISON, EPSILON, ANISOTROPY], ids=["comparison", "epsilon", "anisotropy"])
def test_the_smoke_runs(study, tmp_path, capsys):
    assert study.main(["--smoke", "--output_dir", str(tmp_path)]) == 0
    assert "| --- |" in capsys.readouterr().out and len(list((tmp_path / "smoke").glob("*.png"))) == 1
