"""The study behind docs/beta.md: each candidate's rule takes hold and goes away again."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from sadam_integrations import SadamW, calibration, chosen_betas, update

STUDY = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "studies" / "beta.py"), run_name="study")
CANDIDATES = {c.name: c for candidates in STUDY["CANDIDATES"].values() for c in candidates if c.kind != "adamw"}


@pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=CANDIDATES)
def test_a_candidate_changes_the_rule_while_it_is_in_force(candidate):
    before = calibration.FLOOR, calibration.GAIN, calibration.QUANTILE, update.softplus, calibration.measure
    p = torch.nn.Parameter(torch.zeros(1000))
    p.grad = torch.arange(1.0, 1001.0)
    with candidate.rule():
        optimizer = SadamW([p], lr=1.0)
        optimizer.step()
    quantile = {None: 577.6, 0.1: 100.0, 0.25: 250.0, 0.5: 500.0}[candidate.quantile]  # of 1, 2, ..., 1000
    floor = candidate.floor * quantile
    assert update.LN2 / chosen_betas(optimizer)["0.0"] == pytest.approx(floor, rel=0.05)
    capped = (
        500.0 + floor
        if candidate.kind == "relative epsilon"
        else float(update.softplus(torch.tensor(500.0), update.LN2 / floor))
    )
    assert -p[499].item() == pytest.approx(candidate.gain * 500.0 / capped, rel=0.05)
    assert before == (calibration.FLOOR, calibration.GAIN, calibration.QUANTILE, update.softplus, calibration.measure)


def test_tables_and_figure(tmp_path, capsys):
    row = {"accuracy": 0.8, "loss": 0.5, "train_loss": 0.4, "spread": 3.0, "adamw_spread": 9.0}
    rows = [
        {"candidate": c.name, "lr": lr, "seed": seed, **row, "seconds": 1.0}
        for task, candidates in STUDY["CANDIDATES"].items()
        for c in candidates
        for lr in STUDY["LEARNING_RATES"][task]
        for seed in STUDY["SEEDS"]
    ]
    for task in STUDY["TASKS"]:
        (tmp_path / f"{task}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows) + '{"candidate": "cut sh'
        )
    STUDY["study"](list(STUDY["TASKS"]), tmp_path, smoke=False)
    text = capsys.readouterr().out
    assert "| AdamW | 0.001 | 5 | 0.800 ± 0.000 | 0.500 ± 0.000 | 0.400 ± 0.000 | 3.0 | 3.0 |" in text
    assert (tmp_path / "beta.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_smoke_runs_of_the_tasks(tmp_path, capsys):
    assert STUDY["main"](["vit", "--smoke", "--output_dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "smoke" / "vit.jsonl").read_text().splitlines()]
    assert len(rows) == len(STUDY["CANDIDATES"]["vit"]) * len(STUDY["LEARNING_RATES"]["vit"])
    assert all(0.2 < row["accuracy"] < 1 and row["spread"] > 1 for row in rows)
    assert "| Sadam (auto), floor 2 | 0.001 | 1 |" in capsys.readouterr().out
    row = STUDY["bert"](STUDY["CANDIDATES"]["bert"][1], 5e-4, 0, smoke=True)
    assert 0.4 < row["accuracy"] < 1 and row["adamw_spread"] > row["spread"] > 1
