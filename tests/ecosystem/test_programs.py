"""Other people's programs as they are, in processes of their own: only their command lines name our optimizers."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import check_saved, examples

pytestmark = pytest.mark.slow
LAUNCH = ["-m", "sadam_integrations.launch"]
SHORT = ["--num_train_epochs=2", "--learning_rate=1e-3", "--logging_steps=2", "--save_strategy=epoch", "--seed=0"]
SHORT += ["--report_to=none", "--use_cpu", "--output_dir=out"]


def draw_images(folder, size):
    """16 images to train on and 8 for validation, of two classes, in a folder for each."""
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(0)
    for i in range(24):
        place = folder / ("train" if i < 16 else "validation") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (size, size, 3), dtype="uint8")).save(place / f"{i}.png")


@pytest.mark.parametrize("name", ["run_glue", "run_classification"])
def test_text_classification_of_transformers(name, home, run, tmp_path):
    script = examples("TRANSFORMERS_EXAMPLES", f"pytorch/text-classification/{name}.py")
    data = [f"--train_file={home}/text/train.json", f"--validation_file={home}/text/validation.json"]
    if name == "run_classification":
        data += ["--text_column_names=sentence", "--label_column_name=label", "--shuffle_train_dataset"]
    options = ["--do_train", "--do_eval", "--max_seq_length=16", "--optim=sadamw", "--weight_decay=0.01"]
    printed = run(*LAUNCH, script, f"--model_name_or_path={home}/bert", *data, *options, *SHORT)
    assert 'optim="sadamw" is SadamW(lr=0.001' in printed
    check_saved(tmp_path / "out" / "checkpoint-8")


def test_image_classification_of_transformers(home, run, tmp_path):
    pytest.importorskip("PIL")
    script = examples("TRANSFORMERS_EXAMPLES", "pytorch/image-classification/run_image_classification.py")
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("the script needs torchvision")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    draw_images(tmp_path / "images", 16)
    data = [f"--train_dir={tmp_path}/images/train", f"--validation_dir={tmp_path}/images/validation"]
    options = [
        "--do_train",
        "--do_eval",
        "--optim=samsgradw",
        "--optim_args=beta=1000",
        "--remove_unused_columns=False",
    ]
    model = [
        "--model_name_or_path=vit",
        "--ignore_mismatched_sizes",
        "--label_column_name=label",
        "--remove_unused_columns=False",
    ]
    run(*LAUNCH, script, *model, *data, *options, *SHORT)
    check_saved(tmp_path / "out" / "checkpoint-4", beta=1000.0)


def test_train_py_of_timm(run, tmp_path):
    script = examples("TIMM_EXAMPLES", "train.py")
    draw_images(tmp_path / "images", 40)
    model = ["--model=test_vit", "--img-size=32", "--num-classes=2", "--device=cpu", "--workers=0"]
    options = ["--opt=sadamw", "--opt-kwargs", "beta=50", "--lr=1e-3", "--weight-decay=0.05"]
    length = ["--epochs=2", "--batch-size=4", "--warmup-epochs=0", "--cooldown-epochs=0"]
    run(*LAUNCH, "--timm", script, "--data-dir=images", *model, *options, *length, "--output=out")
    checkpoint = torch.load(next(tmp_path.rglob("last.pth.tar")), weights_only=False)["optimizer"]
    assert {group["beta"] for group in checkpoint["param_groups"]} == {50}
    assert {int(entry["step"]) for entry in checkpoint["state"].values()} == {8}


def test_trl_sft(home, run, tmp_path):
    """In one process: two on a CPU can hang when they end, with AdamW and without our launcher too."""
    pytest.importorskip("trl")
    data = [f"--dataset_name={home}/sft", "--max_length=16", "--optim=sadamw", "--optim_args=beta=1000, foreach=false"]
    accelerate = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    model = [f"--model_name_or_path={home}/llama", "--dtype=float32", "--bf16=false", "--gradient_checkpointing=false"]
    run(*LAUNCH, "-m", "trl.cli.main", "sft", *accelerate, *model, *data, *SHORT)
    check_saved(tmp_path / "out" / "checkpoint-8", beta=1000.0)


def test_nlp_example_of_accelerate(home, run, tmp_path):
    """It names its optimizer in an import, which is the one line that is changed; what it loads lies beside it."""
    script = examples("ACCELERATE_EXAMPLES", "nlp_example.py").read_text()
    changed = script.replace("from torch.optim import AdamW\n", "from sadam_integrations import SadamW as AdamW\n")
    assert changed != script
    (tmp_path / "nlp_example.py").write_text(changed)
    (tmp_path / "bert-base-cased").symlink_to(home / "bert")
    rows = [{"sentence1": "a b c", "sentence2": "d e"[: 1 + i % 3], "label": i % 2, "idx": i} for i in range(48)]
    folder = tmp_path / "nyu-mll" / "glue" / "mrpc"
    folder.mkdir(parents=True)
    import json

    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = "---\nconfigs:\n- config_name: mrpc\n  data_files:\n  - {split: train, path: mrpc/train.jsonl}\n"
    config += "  - {split: validation, path: mrpc/validation.jsonl}\n---\n"
    (folder.parent / "README.md").write_text(config)
    printed = run("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "nlp_example.py", "--cpu")
    assert len(re.findall(r"^epoch \d: \{'accuracy': ", printed, re.MULTILINE)) == 3


def test_a_lightning_cli_project(run, tmp_path):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("lightning")
    (tmp_path / "main.py").write_text(
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel\n"
        "LightningCLI(DemoModel, BoringDataModule)\n"
    )
    options = ["--optimizer=sadam_integrations.SadamW", "--optimizer.lr=0.05", "--optimizer.beta=50"]
    trainer = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0, "accelerator": "cpu"}
    run("main.py", "fit", *options, *(f"--trainer.{key}={value}" for key, value in trainer.items()))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["beta"] == 50 and state["state"][0]["step"] == 4
    assert "class_path: sadam_integrations.SadamW" in next(tmp_path.rglob("config.yaml")).read_text()
