"""Libraries that train through the Hugging Face Trainer, in this process: the optimizer that trained is ours."""

from __future__ import annotations

import pytest
import torch
from conftest import check_losses, check_saved

pytest.importorskip("transformers")
import hf_tiny
from transformers import AutoModelForSequenceClassification, TrainerCallback

import sadam_integrations.huggingface  # noqa: F401
from sadam_integrations import SadamW, SAMSGradW

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-3}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_peft_trains_the_adapters_alone(home, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(home / "bert")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = hf_tiny.arguments(tmp_path, **QUIET, optim="sadamw", weight_decay=0.1, save_strategy="epoch")
    trainer = hf_tiny.Trainer(model, args, train_dataset=hf_tiny.Pairs())
    trainer.train()
    assert type(trainer.optimizer.optimizer) is SadamW
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert held == len(moved) == len(trainer.optimizer.state)
    check_saved(tmp_path / "checkpoint-8")


def test_trl(home, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    args = trl.SFTConfig(
        str(tmp_path), **QUIET, optim="samsgradw", max_steps=4, max_length=16, bf16=False, gradient_checkpointing=False
    )
    data = datasets.Dataset.from_json(str(home / "sft" / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    trainer = trl.SFTTrainer(str(home / "llama"), args=args, train_dataset=data)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is SAMSGradW
    check_losses(losses(trainer))
    check_saved(tmp_path / "checkpoint-4")


def test_sentence_transformers(home, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    model = sentence_model(st, home)
    args = st.SentenceTransformerTrainingArguments(
        str(tmp_path), **QUIET, optim="sadamw", optim_args="beta=1000", max_steps=4
    )
    rows = {"first": ["a b", "c d", "e f"] * 4, "second": ["b a", "d c", "g h"] * 4, "score": [1.0, 0.5, 0.0] * 4}
    trainer = st.SentenceTransformerTrainer(model, args, train_dataset=datasets.Dataset.from_dict(rows))
    trainer.train()
    assert type(trainer.optimizer.optimizer) is SadamW
    check_losses(losses(trainer))
    check_saved(tmp_path / "checkpoint-4", beta=1000.0)


def sentence_model(st, home):
    return st.SentenceTransformer(str(home / "bert"), device="cpu")  # with mean pooling


def test_setfit(home, tmp_path):
    """Its arguments have no optim; those of the trainer inside it do."""
    setfit = pytest.importorskip("setfit")
    import sentence_transformers
    from datasets import Dataset

    model = setfit.SetFitModel(
        model_body=sentence_model(sentence_transformers, home), model_head=setfit.SetFitHead(32, 2)
    )
    data = Dataset.from_dict({"text": ["a b c", "d e f", "g h i", "j k l"], "label": [0, 1, 0, 1]})
    args = setfit.TrainingArguments(str(tmp_path), batch_size=2, num_epochs=1, report_to="none", logging_steps=1)
    trainer = setfit.Trainer(model=model, args=args, train_dataset=data)
    trainer.st_trainer.args.set_optimizer(name="sadamw", args="beta=1e4")
    seen = []

    class Seen(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer)

    trainer.add_callback(Seen())
    trainer.train()
    (optimizer,) = seen
    assert type(getattr(optimizer, "optimizer", optimizer)) is SadamW and optimizer.param_groups[0]["beta"] == 1e4
    history = trainer.st_trainer.state.log_history
    check_losses([entry["embedding_loss"] for entry in history if "embedding_loss" in entry])


def test_optuna(tmp_path):
    """A search over beta and the name: each trial trains anew, with what the trial says."""
    pytest.importorskip("optuna")
    tried = []

    class Seen(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            tried.append((type(inner).__name__.lower(), inner.param_groups[0]["beta"], len(inner.state)))

    def space(trial):
        return {
            "optim": trial.suggest_categorical("optim", ["sadamw", "samsgradw"]),
            "optim_args": trial.suggest_categorical("optim_args", ["beta=100", "beta=auto"]),
        }

    args = hf_tiny.arguments(tmp_path, **QUIET, optim="sadam", eval_strategy="epoch")
    data = {"train_dataset": hf_tiny.Pairs(), "eval_dataset": hf_tiny.Pairs(8)}
    trainer = hf_tiny.Trainer(None, args, model_init=hf_tiny.model, callbacks=[Seen()], **data)
    import optuna

    sampler = optuna.samplers.GridSampler({"optim": ["sadamw", "samsgradw"], "optim_args": ["beta=100", "beta=auto"]})
    best = trainer.hyperparameter_search(space, n_trials=4, direction="minimize", sampler=sampler)
    assert {trial[:2] for trial in tried} == {(n, b) for n in ("sadamw", "samsgradw") for b in (100.0, "auto")}
    assert len({held for *_, held in tried}) == 1 and tried[0][2] > 0
    assert best.objective > 0 and best.hyperparameters["optim"] in ("sadamw", "samsgradw")
