"""What each of two processes runs for test_deepspeed.py: every check, its errors written to a file."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

import deepspeed
import hf_tiny
import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning_worker import OPTIONS, QUIET, STEPS, Lit, dist_folder, fresh, one_process
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, set_seed

import sadam_integrations.huggingface
from sadam_integrations import SadamW, chosen_betas
from sadam_integrations.lightning import UseOptimizer
from sadam_integrations.moments import unwrap

NAMES = ("sadamw", "samsgradw")
STAGES = (1, 2, 3)
FIXED = "beta=1000"
SEEDS = range(3)
LONG = {"num_train_epochs": 12, "learning_rate": 2e-3}
"""Enough to learn the task of hf_tiny."""
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")


class SameBatches(Trainer):
    """Without a factor of the number of processes on the loss, which a fixed beta would see."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def trainer(folder, deepspeed=None, seed=0, callbacks=None, **kwargs):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that one and two processes agree
    batch = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    options = {"optim": "sadamw", "weight_decay": 0.1, "per_device_train_batch_size": batch, "seed": seed, **kwargs}
    args = hf_tiny.arguments(folder, deepspeed=deepspeed, **options)
    set_seed(seed)
    model = BertForSequenceClassification(hf_tiny.config(**still))
    return SameBatches(
        model, args, train_dataset=hf_tiny.Pairs(32), eval_dataset=hf_tiny.Pairs(32), callbacks=callbacks
    )


def zero(stage, **kwargs):
    return {"zero_optimization": {"stage": stage, **kwargs.pop("zero", {})}, **AUTO, **kwargs}


def weights(model):
    params = list(model.parameters())
    sharded = any(hasattr(p, "ds_id") for p in params)
    with deepspeed.zero.GatheredParameters(params) if sharded else contextlib.nullcontext():
        return [p.detach().clone() for p in params]


def alone(folder):
    """Trains in one process what two are compared with; the test runs it before them."""
    found = {}
    for name in NAMES:
        one = trainer(folder / "alone", optim=name, optim_args=FIXED)
        start = [p.detach().clone() for p in one.model.parameters()]
        one.train()
        found[name] = [p.detach().clone() for p in one.model.parameters()]
    losses = []
    for seed in SEEDS:
        one = trainer(folder / "alone", seed=seed, **LONG)
        one.train()
        losses.append(one.evaluate()["eval_loss"])
    torch.save({"start": start, "losses": losses, **found}, folder / "alone.pt")


def equals_one_process(folder, name, *args, **kwargs):
    two = trainer(dist_folder(folder), *args, optim=name, optim_args=FIXED, **kwargs)
    two.train()
    assert type(unwrap(two.optimizer)) is sadam_integrations.factory.OPTIMIZERS[name], two.optimizer
    want = torch.load(folder / "alone.pt")
    moved = 0
    for p, q, start in zip(weights(two.model), want[name], want["start"], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
        moved += not torch.equal(q, start)
    assert moved > len(want["start"]) // 2
    return two


def resumes(folder, **kwargs):
    """A run stopped after its first epoch and taken up by a new Trainer ends as the one that went through."""

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    folder = dist_folder(folder)
    through = trainer(folder + "/through", **kwargs)
    through.train()
    trainer(folder, callbacks=[Stop()], save_strategy="epoch", **kwargs).train()
    resumed = trainer(folder, **kwargs)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    assert resumed.state.global_step == through.state.global_step == 8
    betas = [chosen_betas(t.optimizer) for t in (through, resumed)]
    assert betas[0] and betas[0] == betas[1] and min(betas[0].values()) > 0, betas
    assert all(map(torch.equal, weights(through.model), weights(resumed.model)))


def refuses(folder, message, **kwargs):
    run = trainer(dist_folder(folder), **kwargs)
    before = weights(run.model)
    try:
        run.train()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"trained with {unwrap(run.optimizer)}")
    assert all(map(torch.equal, before, weights(run.model))) and run.state.global_step == 0


def by_environment(**variables):
    """What ``accelerate launch --use_deepspeed`` hands to its processes."""
    named = {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(value) for key, value in variables.items()}
    return mock.patch.dict(os.environ, {"ACCELERATE_USE_DEEPSPEED": "true", **named})


# The Trainer


def check_a_fixed_beta_equals_one_process(folder):
    for stage in STAGES:
        for name in NAMES:
            equals_one_process(folder, name, zero(stage))


def check_auto_says_once_that_it_measures_flat_tensors_and_does_so_alike_on_all_ranks(folder):
    for stage in STAGES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            run = trainer(dist_folder(folder), zero(stage))
            run.train()
        said = [str(w.message) for w in caught if "each flat tensor that DeepSpeed makes" in str(w.message)]
        assert len(said) == (dist.get_rank() == 0), [str(w.message) for w in caught]
        betas = chosen_betas(run.optimizer)
        assert len(betas) == 2 and min(betas.values()) > 0, betas  # a piece for each of the Trainer's groups
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, betas)
        assert all(own == betas for own in everyone), everyone


def check_auto_ends_no_worse_than_one_process_beyond_seed_noise(folder):
    want = torch.load(folder / "alone.pt")["losses"]
    for stage in STAGES:
        losses = []
        for seed in SEEDS:
            run = trainer(dist_folder(folder), zero(stage), seed=seed, **LONG)
            run.train()
            losses.append(run.evaluate()["eval_loss"])
        print(f"ZeRO-{stage}: {losses}, one process: {want}", flush=True)
        noise = max(map(statistics.stdev, (losses, want)))
        assert statistics.mean(losses) < statistics.mean(want) + noise, (losses, want)


def check_resuming_with_auto(folder):
    for stage in STAGES:
        resumes(folder, deepspeed=zero(stage), optim=NAMES[stage % 2])


def check_resuming_with_a_fixed_beta(folder):
    for stage in STAGES:
        resumes(folder, deepspeed=zero(stage), optim_args=FIXED)


# What DeepSpeed would put in the optimizer's place


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SECTION = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}


def check_offload_is_refused(folder):
    refuses(folder, "would train with DeepSpeedCPUAdam instead of SadamW", deepspeed=zero(2, zero=OFFLOAD))


def check_offload_is_refused_where_the_environment_asks_for_it(folder):
    with by_environment(zero_stage=2, offload_optimizer_device="cpu"):
        refuses(folder, "would train with DeepSpeedCPUAdam instead of SadamW")
    path = Path(dist_folder(folder), "deepspeed.json")
    path.write_text(json.dumps(zero(2, zero=OFFLOAD)))
    with by_environment(config_file=path):
        refuses(folder, "would train with DeepSpeedCPUAdam instead of SadamW")


def check_offload_as_the_message_says(folder):
    for stage in STAGES:
        equals_one_process(folder, "sadamw", zero(stage, zero=OFFLOAD, zero_force_ds_cpu_optimizer=False))


def check_the_environment_alone_trains_ours(folder):
    with by_environment(zero_stage=2):
        run = equals_one_process(folder, "sadamw")
    assert run.is_deepspeed_enabled


def check_an_optimizer_section_is_refused(folder):
    refuses(folder, 'would train with AdamW instead of optim="sadamw"', deepspeed=zero(2, **SECTION))


def check_an_optimizer_section_is_refused_where_the_environment_brings_it(folder):
    path = Path(dist_folder(folder), "deepspeed.json")
    path.write_text(json.dumps(zero(2, **SECTION)))
    with by_environment(config_file=path):
        refuses(folder, 'would train with AdamW instead of optim="sadamw"')


def check_an_optimizer_section_is_left_alone_with_another_optim(folder):
    """The premise, too: the section wins over ``optim`` without a word."""
    run = trainer(dist_folder(folder), zero(2, **SECTION), optim="sgd")
    run.train()
    assert type(unwrap(run.optimizer)) is torch.optim.AdamW


# Lightning


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy without its refusal to run on a CPU, and without what it asks a GPU for."""

    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def fit(module, stage=2, epochs=2, ckpt_path=None, callbacks=None, **kwargs):
    strategy = OnCPU(stage=stage, logging_batch_size_per_gpu=4, **kwargs)
    run = L.Trainer(**{**QUIET, "max_epochs": epochs}, strategy=strategy, callbacks=callbacks)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def module(beta):
    return Lit(lambda groups: SadamW(groups, beta=beta, **OPTIONS), shard=False)


def check_lightning_with_a_fixed_beta_equals_one_process(folder):
    net, _ = one_process(lambda groups: SadamW(groups, beta=50.0, **OPTIONS))
    for stage in STAGES:
        lit = module(50.0)
        run = fit(lit, stage)
        assert type(unwrap(run.optimizers[0])) is SadamW
        for p, q, start in zip(weights(lit), net.parameters(), fresh().parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=2e-5, atol=1e-6)
            assert not torch.equal(p, start)


def check_lightning_resumes(folder):
    for stage in STAGES:
        for beta in ("auto", 50.0):
            path = Path(dist_folder(folder)) / "checkpoint"
            fit(module(beta), stage, epochs=1).save_checkpoint(path)
            through, resumed = module(beta), module(beta)
            fit(through, stage)
            run = fit(resumed, stage, ckpt_path=path)
            assert run.global_step == 2 * STEPS
            betas = chosen_betas(run.optimizers[0])
            assert len(betas) == 2 and min(betas.values()) > 0, betas
            assert all(map(torch.equal, weights(through), weights(resumed)))


def check_lightning_offload_is_refused_by_deepspeed(folder):
    try:
        fit(module(50.0), offload_optimizer=True)
    except deepspeed.runtime.zero.utils.ZeRORuntimeException as error:
        assert "SadamW" in str(error) and '"zero_force_ds_cpu_optimizer": false' in str(error)
    else:
        raise AssertionError("trained")


def check_lightning_with_an_optimizer_section_trains_with_that(folder):
    """The trap itself: ``configure_optimizers`` is not called. ``UseOptimizer`` says so."""
    section = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4, **section}
    run = fit(module(50.0), config=config)
    assert type(unwrap(run.optimizers[0])) is torch.optim.AdamW
    try:
        fit(module(50.0), config=config, callbacks=[UseOptimizer()])
    except ValueError as error:
        assert 'has an "optimizer" section, and DeepSpeed would train with AdamW' in str(error), error
    else:
        raise AssertionError("trained")


def checks():
    return {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def main(folder, *only):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    rank, errors = os.environ["RANK"], {}
    for name, check in checks().items():
        if only and name not in only:
            continue
        print(name, flush=True)
        try:
            check(Path(folder))
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
            print(errors[name], flush=True)
        dist.barrier()
    Path(folder, f"results.{rank}").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
