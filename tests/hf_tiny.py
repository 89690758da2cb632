"""A tiny BERT with random weights, a synthetic task for it and Trainers around them, for the tests."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

NAMES = ["sadam", "samsgrad", "sadamw", "samsgradw"]
STEPS_AN_EPOCH = 4


class Pairs(torch.utils.data.Dataset):
    """Sixteen sequences of eight tokens; the label says whether the first token is from the upper half."""

    def __init__(self, size=16):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 32, (size, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": int(self.ids[i, 0] >= 16)}


def config(**kwargs):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{"vocab_size": 32, "max_position_embeddings": 32, **sizes, **kwargs})


def model():
    set_seed(0)
    return BertForSequenceClassification(config())


def arguments(folder, **kwargs):
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    short = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return TrainingArguments(str(folder), **{**quiet, **short, **kwargs})


def trainer(folder, cls=Trainer, callbacks=None, **kwargs):
    return cls(model(), arguments(folder, **kwargs), train_dataset=Pairs(), eval_dataset=Pairs(8), callbacks=callbacks)
