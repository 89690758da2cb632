"""What each of two processes runs for test_lightning_distributed.py: every check, its errors written to a file."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from distributed_worker import fresh, whole
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sadam_integrations import Sadam, SadamW, chosen_betas, param_groups
from sadam_integrations.lightning import UseOptimizer

QUIET = {
    "accelerator": "cpu", "devices": 2, "max_epochs": 2, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
    "use_distributed_sampler": False,  # it would shuffle
}  # fmt: skip
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
BATCH, STEPS = 8, 4


def data():
    torch.manual_seed(1)
    return torch.randn(BATCH * STEPS, 6)


class Lit(L.LightningModule):
    """The model of test_distributed.py; its parameters are sharded in configure_model if it is asked to."""

    def __init__(self, optimizer: OptimizerCallable = Sadam, shard: bool = True):
        super().__init__()
        self.net, self.optimizer, self.shard = fresh(), optimizer, shard

    def configure_model(self):
        if self.shard:
            for layer in (self.net.up, self.net.down, self.net.head, self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        mine = data().view(STEPS, 2, BATCH // 2, 6)[:, dist.get_rank()]
        return torch.utils.data.DataLoader(mine.flatten(0, 1), batch_size=BATCH // 2)

    def configure_optimizers(self):
        return self.optimizer(param_groups(self))


class Foreign(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def strategy(kind, distributed_checkpoint=True):
    if kind == "ddp":
        return "ddp"
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed_checkpoint
    )


def weights(module):
    return [whole(p).clone() for p in module.parameters()]


def one_process(make, epochs=2):
    net = fresh()
    optimizer = make(param_groups(net))
    for t in range(epochs * STEPS):
        optimizer.zero_grad()
        net(data()[BATCH * (t % STEPS) :][:BATCH]).square().mean().backward()
        optimizer.step()
    return net, optimizer


def equals_one_process(kind, beta, cls=SadamW, foreign=False):
    def make(groups):
        return cls(groups, beta=beta, **OPTIONS)

    if foreign:
        module = Foreign(shard=kind == "fsdp2")
        trainer = L.Trainer(**QUIET, strategy=strategy(kind), callbacks=[UseOptimizer(make)])
    else:
        module = Lit(make, shard=kind == "fsdp2")
        trainer = L.Trainer(**QUIET, strategy=strategy(kind))
    trainer.fit(module)
    assert trainer.world_size == 2 and type(trainer.optimizers[0]) is cls
    assert all(isinstance(p, DTensor) == (kind == "fsdp2") for p in module.parameters())
    net, optimizer = one_process(make)
    for p, q, start in zip(weights(module), net.parameters(), fresh().parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=2e-5, atol=1e-6)
        assert not torch.equal(p, start)
    want, betas = chosen_betas(optimizer, net), chosen_betas(trainer.optimizers[0], module.net)
    assert betas.keys() == want.keys() and all(abs(betas[name] / want[name] - 1) < 1e-4 for name in want)


def check_ddp_auto(folder):
    equals_one_process("ddp", "auto")


def check_ddp_fixed(folder):
    equals_one_process("ddp", 50.0)


def check_fsdp2_auto(folder):
    equals_one_process("fsdp2", "auto")


def check_fsdp2_fixed(folder):
    equals_one_process("fsdp2", 50.0)


def check_fsdp2_use_optimizer(folder):
    equals_one_process("fsdp2", "auto", foreign=True)


def resumes(kind, folder, distributed_checkpoint=True, beta="auto"):
    """A run saved after its first epoch and taken up by a new module ends as the one that went through."""

    def make(groups):
        return SadamW(groups, beta=beta, **OPTIONS)

    def run(epochs, ckpt_path=None):
        trainer = L.Trainer(**{**QUIET, "max_epochs": epochs}, strategy=strategy(kind, distributed_checkpoint))
        module = Lit(make, shard=kind == "fsdp2")
        if ckpt_path:
            with torch.no_grad():
                for p in module.parameters():
                    p.zero_()
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, module

    path = Path(dist_folder(folder)) / "checkpoint"
    trainer, _ = run(1)
    trainer.save_checkpoint(path)
    assert path.is_dir() == (kind == "fsdp2" and distributed_checkpoint)
    _, through = run(2)
    trainer, resumed = run(2, path)
    assert trainer.global_step == 2 * STEPS
    assert chosen_betas(trainer.optimizers[0], resumed)["net.up.weight"] > 0
    for p, q in zip(weights(through), weights(resumed), strict=True):
        assert torch.equal(p, q)


def dist_folder(folder):
    """A new folder, the same in both processes."""
    names = [os.path.join(folder, os.urandom(4).hex())]
    dist.broadcast_object_list(names)
    os.makedirs(names[0], exist_ok=True)
    return names[0]


def check_ddp_checkpoint(folder):
    resumes("ddp", folder)


def check_fsdp2_sharded_checkpoint(folder):
    resumes("fsdp2", folder)


def check_fsdp2_sharded_checkpoint_fixed(folder):
    resumes("fsdp2", folder, beta=50.0)


def check_fsdp2_full_checkpoint(folder):
    resumes("fsdp2", folder, distributed_checkpoint=False)


def check_fsdp2_full_checkpoint_fixed(folder):
    resumes("fsdp2", folder, distributed_checkpoint=False, beta=50.0)


def cli(*args, **kwargs):
    return LightningCLI(
        Lit, trainer_defaults=QUIET, save_config_callback=None,
        args=["fit", "--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.data_parallel_size=2",
              "--trainer.strategy.tensor_parallel_size=1", *args], **kwargs,
    )  # fmt: skip


def check_by_name_on_the_command_line_trains_nothing_with_torchs_adamw(folder):
    """The trap itself: no error, no warning, and the weights of the beginning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = cli("--optimizer=AdamW", "--optimizer.lr=0.05")
    assert not any("updated" in str(w.message) for w in caught)
    assert run.trainer.global_step == 2 * STEPS
    for p, start in zip(weights(run.model), fresh().parameters(), strict=True):
        assert torch.equal(p, start)


def check_by_name_on_the_command_line_is_an_error_with_ours(folder):
    try:
        cli("--optimizer=SadamW", "--optimizer.lr=0.05")
    except RuntimeError as error:
        assert "SadamW has none of the parameters that Lit is trained with" in str(error), error
        assert "in configure_optimizers, and not by --optimizer" in str(error)
    else:
        raise AssertionError("trained without an error")


def check_the_injected_form_trains_from_the_command_line(folder):
    run = cli("--model.optimizer=SadamW", "--model.optimizer.lr=0.05", auto_configure_optimizers=False)
    assert type(run.trainer.optimizers[0]) is SadamW
    for p, start in zip(weights(run.model), fresh().parameters(), strict=True):
        assert not torch.equal(p, start)


def checks():
    return {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


def main(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", ".*nothing was updated")  # also not when a checkpoint is loaded
    rank, errors = os.environ["RANK"], {}
    for name, check in checks().items():
        print(name, flush=True)
        try:
            check(folder)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
            print(errors[name], flush=True)
        dist.barrier()
    Path(folder, f"results.{rank}").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
