"""The monitor in the recipes and in sadam compare: its figures, alr.jsonl and alr.png of whole and of resumed runs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sadam_integrations import SadamW, alr, cli, plots, recipe, run_folder

for module in ("jsonargparse", "matplotlib", "transformers", "datasets", "evaluate", "lightning"):
    pytest.importorskip(module)

from test_recipe import csv_arguments, csv_files, tiny_model  # noqa: E402, F401

BERT, VIT = (recipe.recipes_folder() / f"{name}.py" for name in ("bert", "vit"))
TOY = Path(__file__).parent / "scripts" / "toy.py"
TINY = {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 32, "batch_size": 16, "test_split": "null", "mixup": 0}
TINY |= {"train_size": 150, "eval_size": 50}
PNG = b"\x89PNG"


def line(step, scale=1.0, groups=("embeddings", "layer 0", "head")):
    """A line of alr.jsonl."""
    values = {"min": 3.0, "q01": 10.0, "q25": 50.0, "median": 60.0, "q75": 70.0, "q99": 5e3, "max": 1e8}
    summary = {key: value * scale for key, value in values.items()} | {"q99_over_q01": 500.0}
    histogram = {"edges": [0.5, 1.0, 1.5, 2.0], "before": [0.0, 0.25, 0.75], "after": [0.25, 0.75, 0.0]}
    return {"step": step, "all": summary, "groups": dict.fromkeys(groups, summary), "histogram": histogram}


def spoilt(value):
    """A line without a number that a logarithmic axis could show."""
    odd = dict.fromkeys(line(1)["all"], value)
    empty = {"edges": [], "before": [], "after": []}
    return {"step": 1, "all": odd, "groups": {"head": odd}, "histogram": empty}


@pytest.fixture
def drawn(monkeypatch):
    """The figures instead of their files."""
    figures = []
    monkeypatch.setattr(plots.monitor, "save", lambda figure, path: figures.append(figure))
    return figures


def panels(figure):
    return {axes.get_title("left"): axes for axes in figure.get_axes()}


# ---------------------------------------------------------------- the figures


def test_the_figure_shows_the_quantiles_and_the_histogram(drawn):
    plots.alr_figure([line(10), line(20, 2.0), line(40, 4.0)], "f.png", "a run")
    shown = panels(drawn[0])
    whole, histogram, *rest = shown.values()
    assert list(shown)[2:] == ["embeddings", "layer 0", "head"]
    for axes in (whole, *rest):
        curves = np.array([curve.get_ydata() for curve in axes.get_lines()])
        assert curves == pytest.approx(np.outer((3.0, 1e8, 60.0), (1, 2, 4)))
        (wide, narrow) = (band.get_paths()[0].vertices for band in axes.collections)
        for vertices, low, high in ((wide, 10.0, 5e3), (narrow, 50.0, 70.0)):
            ends = vertices[vertices[:, 0] == 40][:, 1]
            assert (min(ends), max(ends)) == pytest.approx((4 * low, 4 * high))
        assert axes.get_yscale() == "log" and axes.get_xlim() == (0, 40)
    assert whole.get_ylim()[0] < 3 and whole.get_ylim()[1] > 4e8
    assert all(axes.get_ylim() == rest[0].get_ylim() for axes in rest)
    assert rest[0].get_ylim()[0] < 10 and 2e4 < rest[0].get_ylim()[1] < 1e6
    heights = {tuple(map(float, patch.get_data().values)) for patch in histogram.patches}
    assert heights == {(0.0, 25.0, 75.0), (25.0, 75.0, 0.0)}
    assert histogram.patches[0].get_data().edges == pytest.approx([10**0.5, 10, 10**1.5, 100])
    legend = histogram.get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["the A-LR used", "1 / sqrt(v): Adam with epsilon 0"]


def test_the_largest_rate_is_marked_where_the_histogram_ends(drawn):
    capped = line(10)
    capped["all"]["max"] = 30.0
    plots.alr_figure([capped], "f.png")
    legend = list(panels(drawn[0]).values())[1].get_legend()
    assert "largest used: 30" in [text.get_text() for text in legend.get_texts()]


def test_labels_at_the_lines_do_not_overlap(drawn):
    for spread in (1.0, 1.01, 30.0):
        same = line(10)
        same["all"] = {
            key: 50 * spread**i for i, key in enumerate(("min", "q01", "q25", "median", "q75", "q99", "max"))
        }
        plots.alr_figure([line(5), same], "f.png")
        texts = next(iter(panels(drawn[-1]).values())).texts
        heights = [text.xyann[1] for text in texts]
        names = ["max", "99 %", "75 %", "median", "25 %", "1 %", "min"]
        assert [text.get_text().split(":")[0] for text in texts] == names
        assert all(a - b > 0.06 for a, b in itertools.pairwise(heights))
        assert min(heights) > -0.01 and max(heights) < 1.01


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([*(f"layer {i}" for i in range(11, -1, -1)), "head", "embeddings"],
         ["embeddings", *(f"layers {i} to {i + 1}" for i in range(0, 12, 2)), "head"]),
        (["embeddings", *(f"layer {i}" for i in range(6)), "head"],
         ["embeddings", *(f"layer {i}" for i in range(6)), "head"]),
        ([*"abcdefghij"], ["a", "b", "c", "d to e", "f", "g", "h", "i to j"]),
        ([*"abcdefgh", "layer 0", "layer 1"], ["a", "b", "c", "d to e", "f", "g", "h", "layers 0 to 1"]),
    ],
)  # fmt: skip
def test_many_layers_share_eight_panels(drawn, groups, names):
    plots.alr_figure([line(1, 1.0, groups), line(2, 1.0, groups[1:])], "f.png")
    shown = list(panels(drawn[0]))[2:]
    assert shown == names


def test_layers_that_share_a_panel_keep_their_extremes(drawn):
    lines = [line(1, 1.0, [f"layer {i}" for i in range(16)]), line(2, 1.0, [f"layer {i}" for i in range(16)])]
    for one in lines:
        one["groups"]["layer 1"] = {"min": 1.0, "median": 60.0 * 4, "max": 2e8}
    plots.alr_figure(lines, "f.png")
    curves = [tuple(curve.get_ydata()) for curve in panels(drawn[0])["layers 0 to 1"].get_lines()]
    assert curves == [(1.0, 1.0), (2e8, 2e8), pytest.approx((120.0, 120.0))]


def test_a_comparison_shows_each_run_and_its_spread(drawn):
    runs = {"adamw": [line(1), line(20)], "sadamw": [line(5, 2.0), line(30, 2.0)]}
    plots.alr_compare_figure(runs, "f.png", "vit")
    left, right = drawn[0].get_axes()
    assert [curve.get_ydata()[0] for curve in left.get_lines()] == [3.0, 1e8, 60.0, 6.0, 2e8, 120.0]
    assert [tuple(curve.get_xdata()) for curve in right.get_lines()] == [(1, 20), (5, 30)]
    assert all(tuple(curve.get_ydata()) == (500.0, 500.0) for curve in right.get_lines())
    styles = [(curve.get_color(), curve.get_linestyle()) for curve in right.get_lines()]
    assert styles[0][0] != styles[1][0] and styles[0][1] != styles[1][1]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["adamw", "sadamw"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "lines",
    [
        [], [line(3)], [line(0), line(0)], [spoilt(math.nan)], [spoilt(None), line(5)], [line(5), spoilt(0.0)],
        [spoilt(math.inf), spoilt(-1.0)], [{**spoilt(1.0), "all": {"unseen_share": 1.0}, "groups": {}}],
        [line(1), line(2, groups=("layer 7",))], [line(1, 1e-30), line(2, 1e25)],
    ],
    ids=["none", "one", "step 0", "NaN", "null", "zero", "infinite", "unseen", "other groups", "far apart"],
)  # fmt: skip
def test_odd_lines_are_drawn(lines, tmp_path):
    plots.alr_figure(lines, tmp_path / "a.png")
    plots.alr_compare_figure({"a": lines, "b": [line(1), line(9)], "c": []}, tmp_path / "b.png")
    plots.alr_compare_figure({"a": lines} if lines else {}, tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(PNG) for name in "abc")


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def vit():
    return recipe.load(VIT)


def vit_run(vit, folder, callbacks=(), **settings):
    words = [f"--{key}={value}" for key, value in {**TINY, "output_dir": folder, **settings}.items()]
    return vit.run(recipe.parse(vit.Config, words, "", VIT.with_suffix(".yaml")), callbacks)


def steps(folder):
    return [one["step"] for one in alr.Record.read(folder)]


class Stop(Exception):
    """What a run is stopped with."""


def test_vit_is_measured_and_a_stopped_run_as_if_it_had_not_been(vit, tmp_path):
    import lightning as L

    class Stopper(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, data, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 5:
                raise Stop

    settings = {"epochs": 7, "layer_lr_decay": 0.8}  # 63 steps
    vit_run(vit, tmp_path / "whole", **settings)
    assert steps(tmp_path / "whole") == list(range(2, 63, 2))
    assert (tmp_path / "whole" / "alr.png").read_bytes().startswith(PNG)
    last = alr.Record.read(tmp_path / "whole")[-1]
    assert set(last["groups"]) == {"embeddings", "layer 0", "layer 1", "head"}
    with pytest.raises(Stop):
        vit_run(vit, tmp_path / "stopped", [Stopper()], **settings)
    assert steps(tmp_path / "stopped")[-1] == 24 and not (tmp_path / "stopped" / "alr.png").exists()
    vit_run(vit, tmp_path / "stopped", **settings)
    whole, stopped = ((tmp_path / name / "alr.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.parametrize("settings", [{"monitor": "false"}, {"optimizer": "sgd", "lr": 0.1}], ids=["off", "sgd"])
def test_a_run_without_measurements_has_no_figure_of_them(vit, tmp_path, capsys, settings):
    vit_run(vit, tmp_path / "run", epochs=1, **settings)
    assert (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("alr*")) and "arn" not in capsys.readouterr().err


def test_what_a_run_left_before_its_first_checkpoint_is_not_drawn(vit, tmp_path):
    config = recipe.parse(vit.Config, [f"--output_dir={tmp_path / 'run'}"], "", VIT.with_suffix(".yaml"))
    recipe.open_run(config, VIT)
    (tmp_path / "run" / "alr.jsonl").write_text(json.dumps(line(5)) + "\n")
    (tmp_path / "run" / "checkpoints" / "one").mkdir(parents=True)
    recipe.open_run(config, VIT)
    assert steps(tmp_path / "run") == [5]  # interrupted: it goes on
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    recipe.open_run(config, VIT)
    assert steps(tmp_path / "run") == []
    assert {"alr.jsonl", "alr.png"} <= set(run_folder.RUN_FILES)


def test_bert_is_measured_and_a_stopped_run_as_if_it_had_not_been(tmp_path, tiny_model, csv_files):  # noqa: F811
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 15:
                raise Stop

    def run(name, *callbacks):
        words = [*csv_arguments(tiny_model, csv_files, tmp_path / name), "--epochs", "3", "--evaluations", "3"]
        return bert.run(recipe.parse(bert.Config, list(map(str, words)), "", BERT.with_suffix(".yaml")), callbacks)

    bert = recipe.load(BERT)
    run("whole")
    assert steps(tmp_path / "whole") == list(range(2, 31, 2))
    assert (tmp_path / "whole" / "alr.png").read_bytes().startswith(PNG)
    with pytest.raises(Stop):
        run("stopped", Stopper())
    assert steps(tmp_path / "stopped") == list(range(2, 15, 2))
    result = run("stopped")
    whole, stopped = ((tmp_path / name / "alr.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    assert result["history"] == json.loads((tmp_path / "whole" / "result.json").read_text())["history"]


# ---------------------------------------------------------------- sadam compare


def measured(folder, steps, factor=1.0):
    """Puts a real alr.jsonl into a folder."""
    model = torch.nn.Linear(8, 4)
    optimizer, record = SadamW(model.parameters(), lr=1e-3), alr.Record(folder)
    for step in range(1, steps + 1):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * factor
        optimizer.step()
        record.add(step, alr.sample(optimizer, model))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for file in (TOY, TOY.with_suffix(".yaml")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_that_were_measured_are_overlaid(toy, monkeypatch):
    for i, name in enumerate("abc"):
        assert cli.main(["run", "toy.py", f"--output_dir={name}", f"--lr={0.1 * (i + 1)}", f"--seed={i}"]) == 0
    both = ["compare", "a", "b", "c", "--output_dir", "both"]
    assert cli.main(both) == 0
    assert (toy / "both/compare.png").exists() and not (toy / "both/compare_alr.png").exists()
    measured("a", 3)
    measured("c", 5)
    assert cli.main(both) == 0
    assert (toy / "both/compare_alr.png").read_bytes().startswith(PNG)
    given = []
    monkeypatch.setattr(plots, "alr_compare_figure", lambda runs, path, title: given.append((runs, title)))
    assert cli.main(both) == 0
    ((runs, title),) = given
    assert list(runs) == ["a, lr 0.1", "c, lr 0.3"] and [len(lines) for lines in runs.values()] == [3, 5]
    assert title == "toy"


def test_a_comparison_shows_the_first_seed_at_the_chosen_rates(toy, monkeypatch):
    words = ["compare", "toy.py", "--optimizers", "adamw", "sgd", "--lrs", "0.1", "0.02", "--seeds", "2"]
    given = []
    monkeypatch.setattr(plots, "alr_compare_figure", lambda runs, path, title: given.append((runs, title)))
    lengths = {}
    for name in ("adamw", "sgd"):
        for lr in (0.1, 0.02):
            for seed in (0, 1):
                folder = toy / f"runs/compare/toy/{name}-lr{lr}-seed{seed}"
                keys = {"optimizer": name, "lr": lr, "seed": seed, "output_dir": folder}
                assert cli.main(["run", "toy.py", *(f"--{key}={value}" for key, value in keys.items())]) == 0
                lengths[name, lr, seed] = len(lengths) + 1
                if name == "adamw":
                    measured(folder, lengths[name, lr, seed])
    assert cli.main(words) == 0
    rows = json.loads((toy / "runs/compare/toy/compare.json").read_text())["summary"]
    (chosen,) = [row["lr"] for row in rows if row["chosen"] and row["optimizer"] == "adamw"]
    ((runs, title),) = given
    assert {label: len(lines) for label, lines in runs.items()} == {
        f"adamw, lr {chosen:g}": lengths["adamw", chosen, 0]
    }
    assert title == "toy: first seed"
