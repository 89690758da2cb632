"""Text classification with the Trainer on local csv or json files; knows nothing of this package's optimizers."""

import logging
import os
import sys
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    """What to train and evaluate on."""

    train_file: str = field(metadata={"help": "A csv or json file with the columns text and label."})
    validation_file: str = field(metadata={"help": "A csv or json file with the columns text and label."})
    max_seq_length: int = field(default=32, metadata={"help": "Longer texts are cut here."})

    def __post_init__(self):
        for path in (self.train_file, self.validation_file):
            if path.split(".")[-1] not in ("csv", "json"):
                raise ValueError(f"{path} is neither a csv nor a json file")


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str = field(metadata={"help": "A folder or a model of the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data and models are kept."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(format="%(levelname)s - %(name)s - %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    if training_args.should_log:
        transformers.utils.logging.set_verbosity_info()
    logger.setLevel(training_args.get_process_log_level())
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    kind = data_args.train_file.split(".")[-1]
    raw = datasets.load_dataset(kind, data_files=files, cache_dir=model_args.cache_dir)
    labels = sorted(raw["train"].unique("label"))

    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)

    def preprocess(examples):
        result = tokenizer(examples["text"], max_length=data_args.max_seq_length, truncation=True)
        result["label"] = [labels.index(label) for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw = raw.map(preprocess, batched=True, remove_columns=["text"])

    def compute_metrics(prediction):
        return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=raw["train"] if training_args.do_train else None,
        eval_dataset=raw["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them
