"""A run for test_resume.py: ``resume_worker.py ENGINE FOLDER OUT [DIE_AT]`` trains, taking up what is in FOLDER.

With DIE_AT every process kills itself after that step. The weights and the optimizer's state are written to OUT.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from sadam_integrations.moments import unwrap

OPTIMIZER, STEPS = "samsgradw", 8


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def with_trainer(folder, die_at, **kwargs):
    """Saves in the middle of each epoch of four steps; the model has dropout."""
    import hf_tiny
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    import sadam_integrations.huggingface  # noqa: F401

    class Die(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == die_at:
                die()

    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    saves = {"save_strategy": "steps", "save_steps": 3}
    options = {"optim": OPTIMIZER, "weight_decay": 0.1, "per_device_train_batch_size": batch, **saves, **kwargs}
    trainer = hf_tiny.trainer(folder, callbacks=[Die()], **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return trainer.state.global_step, trainer.model.state_dict(), trainer.optimizer


def with_lightning(folder, die_at, shard=False):
    """Saves at the end of each epoch of four steps."""
    import lightning.pytorch as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_worker import QUIET, Lit, strategy, weights

    from sadam_integrations import SAMSGradW

    class Die(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == die_at:
                die()

    module = Lit(lambda groups: SAMSGradW(groups, lr=1e-2, weight_decay=0.1), shard=shard)
    saves = ModelCheckpoint(folder, filename="epoch", enable_version_counter=False)
    checkpoint = Path(folder, "epoch.ckpt")
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [saves, Die()]}
    trainer = L.Trainer(**options, strategy=strategy("fsdp2" if shard else "ddp"))
    trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None)
    return trainer.global_step, weights(module), trainer.optimizers[0]


ZERO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
ENGINES = {
    "trainer": with_trainer,
    "trainer-ddp": with_trainer,
    "trainer-zero2": lambda *args: with_trainer(*args, deepspeed={"zero_optimization": {"stage": 2}, **ZERO}),
    "lightning-ddp": with_lightning,
    "lightning-fsdp2": lambda *args: with_lightning(*args, shard=True),
}


def main(engine, folder, out, die_at=-1):
    torch.set_num_threads(1)
    steps, weights, optimizer = ENGINES[engine](folder, int(die_at))
    local = [
        {key: value.to_local() if hasattr(value, "to_local") else value for key, value in state.items()}
        for state in unwrap(optimizer).state.values()
    ]
    if os.environ.get("RANK", "0") == "0":
        torch.save((steps, weights, local), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
