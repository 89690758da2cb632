"""The ViT recipe: configs, whole runs, exact resuming, a folder of images with ImageNet's settings in two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from sadam_integrations import recipe

for module in ("jsonargparse", "transformers", "datasets", "evaluate", "lightning"):
    pytest.importorskip(module)

from PIL import Image  # noqa: E402

VIT = recipe.recipes_folder() / "vit.py"
DEFAULT = VIT.with_suffix(".yaml")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
TINY = {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 32, "batch_size": 16, "test_split": "null", "mixup": 0}


@pytest.fixture(scope="module")
def vit():
    return recipe.load(VIT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images for training and validation: three classes that differ in brightness, of mixed sizes and modes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("validation", 5)):
        for c, name in enumerate(("dark", "grey", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                array = rng.integers(80 * c, 80 * c + 60, (240 + 9 * i, 300 - 7 * i, 3), dtype=np.uint8)
                mode = ("RGB", "L", "RGBA", "P")[i % 4]
                suffix = "jpeg" if mode in ("RGB", "L") and i % 3 else "png"
                Image.fromarray(array).convert(mode).save(root / split / name / f"{i}.{suffix}")
    return root


def words(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def parsed(vit, *arguments):
    return recipe.parse(vit.Config, list(arguments), "", DEFAULT)


def result(folder):
    found = json.loads((folder / "result.json").read_text())
    return found["metrics"], found["history"]


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- the config


def test_default_config_has_every_key_and_no_other(vit):
    assert list(yaml.safe_load(DEFAULT.read_text())) == [field.name for field in dataclasses.fields(vit.Config)]


@pytest.mark.parametrize("file", sorted(VIT.parent.glob("vit*.yaml")), ids=lambda file: file.name)
def test_every_config_parses(vit, file):
    config = parsed(vit, "--config", file.stem)
    assert config.optimizer == "sadamw" and config.output_dir == f"runs/{file.stem}"
    assert len(file.read_text().splitlines()[0]) < 112


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimiser", "adamw"], "unknown key 'optimiser': did you mean 'optimizer'?"),
        (["--optimizer", "sadamv"], "did you mean sadam or sadamw"),
        (["--optimizer_args.betta", "1"], "no argument 'betta' (did you mean"),
        (["--scheduler", "cosne"], "scheduler: cosne is not a valid SchedulerType"),
        (["--epochs", "0"], "epochs: 0 is not valid, it is at least 1"),
        (["--augment", "flop"], "augment: flop is not valid, it is one of none, flip, crop, randaugment"),
        (["--mixup", "-1"], "mixup: -1.0 is not valid, it is at least 0"),
        (["--ema", "1"], "ema: 1.0 is not valid, it is at least 0 and below 1"),
        (["--image_size", "30"], "image_size: 30 is not a multiple of patch_size 7"),
        (["--image_size", "null"], "image_size: a model from scratch needs a number"),
        (["--heads", "3"], "hidden_size: 64 is not a multiple of heads 3"),
        (["--train_folder", "nowhere"], "train_folder: there is no folder 'nowhere'"),
        (["--train_split", "all"], "fashion_mnist has no split 'all', only train, validation, test"),
        (["--model", "./nowhere"], "model: './nowhere' cannot be loaded"),
        (["--layer_lr_decay", "0"], "layer_lr_decay: 0.0 is not valid"),
        (["--train_folder", ""], "train_folder: it is empty, which is not a value"),
        (["--scheduler", "reduce_lr_on_plateau"], "scheduler: reduce_lr_on_plateau does not follow the steps"),
        (["--scheduler", "cosin"], "scheduler: "),
        (["--optimizer_args.beta", "-1"], "optimizer: SadamW: Invalid beta: -1"),
        (["--optimizer_args.fused", "true", "--optimizer_args.foreach", "true"], "optimizer: SadamW: fused=True and"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(vit, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert vit.main([*words(output_dir=tmp_path / "run", smoke="true"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_without_classes_is_one_line(vit, capsys, tmp_path):
    (tmp_path / "images").mkdir()
    assert vit.main(words(train_folder=tmp_path / "images", output_dir=tmp_path / "run")) == 2
    assert "holds no images in sub-folders" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the module


def test_loss_of_smoothed_and_mixed_labels(vit, monkeypatch):
    def loss(**settings):
        torch.manual_seed(0)
        config = parsed(vit, *words(**{**TINY, **settings}))
        module = vit.build(config, recipe_source)
        monkeypatch.setattr(module, "log", lambda *_: None)
        return module, module.training_step((images, labels), 3)

    recipe_source = vit.data.bundled("train").at_most(40)
    part = vit.data.prepared(recipe_source, 28, 1)
    images, labels = part.images, part.labels
    module, plain = loss()
    logs = module(images).log_softmax(-1)
    each = -logs[torch.arange(40), labels]
    assert torch.allclose(plain, each.mean())
    assert torch.allclose(loss(label_smoothing=0.2)[1], 0.8 * each.mean() - 0.2 * logs.mean())
    rng = np.random.default_rng((0, 0, 3, 0))
    mixed, targets = vit.augment.mixup(images.float(), labels, 10, 0.5, rng)
    assert torch.allclose(loss(mixup=0.5)[1], -(targets * module(mixed).log_softmax(-1)).sum(1).mean())


def test_layers_have_their_rates_and_no_parameter_is_lost(vit):
    from sadam_integrations.lightning.training import layerwise
    from sadam_integrations.param_groups import param_groups

    model = vit.build(parsed(vit, *words(**TINY)), vit.data.bundled("train").at_most(40)).model
    groups = layerwise(model, param_groups(model), 0.1, 0.5)
    rates = {id(p): (group["lr"], group.get("weight_decay")) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(rates) == len(named) == sum(len(group["params"]) for group in groups)
    assert rates[id(named["classifier.weight"])] == (0.1, None) and rates[id(named["classifier.bias"])] == (0.1, 0.0)
    assert rates[id(named["vit.embeddings.cls_token"])] == (0.1 * 0.5**3, None)
    assert len({group["name"] for group in groups}) == len(groups)


# ---------------------------------------------------------------- whole runs


def test_smoke_run(vit, tmp_path, capsys):
    assert vit.main(["--smoke", *words(output_dir=tmp_path / "run", **{**TINY, "test_split": "test"})]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "run"
    metrics, history = result(folder)
    numbers = f"validation accuracy {metrics['validation_accuracy']:.3f}, test {metrics['test_accuracy']:.3f}, "
    assert out.splitlines()[-1].startswith(f"sadamw lr 0.002: {numbers}")
    assert len(out.splitlines()) == 2 and "Lightning" not in err and "GPU" not in err and "Warning" not in err
    assert set(metrics) == {f"{split}_{key}" for split in ("validation", "test") for key in ("accuracy", "f1", "loss")}
    assert len(history["validation"]) == yaml.safe_load((folder / "config.yaml").read_text())["epochs"]
    assert history["validation"][-1]["accuracy"] == metrics["validation_accuracy"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG") and not (folder / "checkpoints").exists()
    assert (folder / "recipe.py").read_text() == VIT.read_text()

    from transformers import AutoImageProcessor, ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder / "model")
    assert model.config.id2label[9] == "ankle-boot" and model.config.num_channels == 1
    assert AutoImageProcessor.from_pretrained(folder / "model") is not None


class Stop(Exception):
    """What a run is stopped with."""


@pytest.mark.parametrize("batch", [None, 3], ids=["after the training", "amid the second epoch"])
def test_a_stopped_run_ends_as_if_it_had_not_been(vit, tmp_path, monkeypatch, batch):
    import lightning as L

    settings = {"train_size": 150, "eval_size": 50, "epochs": 3, "dropout": 0.1, "mixup": 0.3, "augment": "crop"}
    settings |= {"ema": 0.8, "gradient_accumulation": 2, "layer_lr_decay": 0.8, "warmup_ratio": 0.2}

    class Stopper(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, data, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, batch):
                raise Stop

    def run(name, callbacks=()):
        return vit.run(parsed(vit, *words(output_dir=tmp_path / name, **{**TINY, **settings})), callbacks)

    run("whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        if batch is None:
            patch.setattr(recipe.plots, "training_figure", lambda *_: (_ for _ in ()).throw(Stop()))
        run("stopped", [Stopper()])
    torch.rand(7)  # the generator is elsewhere than it was
    run("stopped")
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    run("again")
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_a_half_written_checkpoint_is_not_read(vit, tmp_path, monkeypatch):
    import lightning as L

    settings = words(output_dir=tmp_path / "run", **TINY, train_size=64, eval_size=20, epochs=3)
    save = L.Trainer.save_checkpoint

    def cut_short(trainer, path, *args, **kwargs):
        save(trainer, path, *args, **kwargs)
        if trainer.current_epoch == 1:
            os.truncate(path, 1000)
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(L.Trainer, "save_checkpoint", cut_short)
        vit.run(parsed(vit, *settings))
    assert len(vit.run(parsed(vit, *settings))["history"]["validation"]) == 3


def test_a_damaged_checkpoint_is_named(vit, tmp_path, capsys):
    settings = words(output_dir=tmp_path / "run", **TINY, train_size=64, eval_size=20, epochs=1)
    recipe.open_run(parsed(vit, *settings), VIT)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    for damaged in (b"", b"text", b"PK\x03\x04" + bytes(1000)):
        checkpoint.write_bytes(damaged)
        assert vit.main(settings) == 2
        error = capsys.readouterr().err
        assert f"error: {checkpoint} is damaged: give --overwrite true" in error and "Traceback" not in error


@pytest.mark.parametrize("moment", ["on_train_epoch_start", "on_test_batch_start"])
def test_ctrl_c_is_passed_on(vit, tmp_path, capsys, monkeypatch, moment):
    import lightning as L

    handler = signal.getsignal(signal.SIGINT)

    def interrupt(self, trainer, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vit.training.Seeded, moment, interrupt)
    assert issubclass(vit.training.Seeded, L.Callback)
    assert vit.main(["--smoke", *words(output_dir=tmp_path / "run", **{**TINY, "test_split": "test"})]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def test_compiled_and_fine_tuned_at_another_size(vit, tmp_path, monkeypatch, folders):
    original = torch.nn.Module.compile
    calls = []

    def compile_eagerly(module):
        calls.append(module)
        return original(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    common = {**TINY, "train_folder": folders / "train", "validation_folder": folders / "validation", "workers": 0}
    common |= {"patch_size": 8, "epochs": 1, "compile": "true", "ema": 0.5}
    vit.main(words(output_dir=tmp_path / "first", image_size=24, **common))
    arguments = words(output_dir=tmp_path / "second", model=tmp_path / "first" / "model", image_size=32, **common)
    assert vit.main(arguments) == 0 and len(calls) == 2
    saved = json.loads((tmp_path / "second" / "model" / "preprocessor_config.json").read_text())
    assert saved["crop_size"] == {"height": 32, "width": 32} and saved["image_mean"] == [0.5] * 3


# ---------------------------------------------------------------- processes


def test_predictions_are_put_together_in_order():
    from types import SimpleNamespace

    from sadam_integrations.lightning.training import gathered

    parts = torch.tensor([[0, 2, 4], [1, 3, 0]])  # of five images; the last is the sampler's padding
    module = SimpleNamespace(all_gather=lambda _: parts, trainer=SimpleNamespace(world_size=2))
    assert gathered(module, parts[0], 5).tolist() == [0, 1, 2, 3, 4]


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(VIT)]
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=ENV, timeout=280)


def test_imagenet_settings_on_a_folder_in_two_processes(vit, folders, tmp_path):
    """224 px, bf16, mixup, label smoothing, averaged weights, clipping, layer decay, workers.

    Workers only in a Python that forks safely while gloo's threads run: python/cpython#112275.
    """
    old = sys.version_info < (3, 10, 15) or (3, 11) <= sys.version_info < (3, 11, 10)
    place = {"train_folder": folders / "train", "validation_folder": folders / "validation"}
    small = {**TINY, "mixup": 0.2, "batch_size": 8, "epochs": 2, "workers": int(not old), "compile": "false"}
    arguments = ["--config", "vit_imagenet", *words(**place, **small, layer_lr_decay=0.75, lr=0.01, ema=0.5)]
    done = torchrun(*arguments, *words(output_dir=tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2 and "validation accuracy" in done.stdout
    metrics, history = result(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["hardware"]["processes"] == 2
    assert [point["step"] for point in history["validation"]] == [2, 4]  # 42 images, 2 processes, batches of 8

    # one process, the weights that two have saved: the same predictions for all 15 images
    arguments = ["--config", "vit_imagenet", *words(**place, **small, lr=0, ema=0, model=tmp_path / "two" / "model")]
    alone = vit.run(parsed(vit, *arguments, *words(output_dir=tmp_path / "one")))["metrics"]
    assert alone["validation_accuracy"] == metrics["validation_accuracy"]
    assert alone["validation_f1"] == metrics["validation_f1"]
    assert alone["validation_loss"] == pytest.approx(metrics["validation_loss"], abs=0.01)


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    def start(name):
        arguments = words(output_dir=tmp_path / name, **TINY, train_size=300, eval_size=100, epochs=12)
        return subprocess.Popen(
            [sys.executable, str(VIT), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
        )

    process = start("whole")
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err

    process = start("killed")
    while not (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "result.json").exists()
    process = start("killed")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert "Resuming from" in out
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_smoke_run_of_the_default_learns(tmp_path):
    done = subprocess.run(
        [sys.executable, str(VIT), "--smoke", *words(output_dir=tmp_path / "run")],
        capture_output=True, text=True, env=ENV, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")[0]["validation_accuracy"] > 0.25
