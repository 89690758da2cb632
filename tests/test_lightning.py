"""Lightning and Fabric: what their features do to the optimizers, each on real training steps, and UseOptimizer."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")
import lightning.pytorch as L

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, chosen_betas, param_groups
from sadam_integrations import lightning as integration
from sadam_integrations.lightning import UseOptimizer

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
PACKAGES = ["lightning.pytorch", *(["pytorch_lightning"] if importlib.util.find_spec("pytorch_lightning") else [])]
both_packages = pytest.mark.parametrize("pl", list(map(importlib.import_module, PACKAGES)), ids=PACKAGES)
every_class = pytest.mark.parametrize("cls", CLASSES)
both_betas = pytest.mark.parametrize("beta", ["auto", 50.0])

BATCH, STEPS = 4, 4
QUIET = {
    "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))


def rows():
    torch.manual_seed(1)
    return torch.randn(BATCH * STEPS, 6)


def loss(module, batch):
    return (module(batch) - 3).square().mean()


def lit(make=None, *, pl=L, module=None, **hooks):
    """A module of either package, with ``make`` to build its optimizer; ``hooks`` are further methods."""

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = module or net()

        def training_step(self, batch, batch_idx):
            return loss(self.net, batch)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(rows(), batch_size=BATCH)

        if make is not None:

            def configure_optimizers(self):
                return make(param_groups(self))

    for name, hook in hooks.items():
        setattr(Lit, name, hook)
    return Lit()


def sadamw(**options):
    return lambda params: SadamW(params, **{"lr": 0.05, **options})


def fit(module, *, pl=L, ckpt_path=None, **options):
    trainer = pl.Trainer(**{**QUIET, **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def by_hand(make, *, batch=BATCH, before_step=None):
    """The same training in plain PyTorch."""
    module = net()
    optimizer = make(param_groups(module))
    for some in rows().split(batch):
        optimizer.zero_grad()
        loss(module, some).backward()
        if before_step:
            before_step([p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()
    return module


def same(one, other):
    one, other = list(one.parameters()), list(other.parameters())
    return len(one) == len(other) and all(map(torch.equal, one, other))


def trained(module):
    return not any(map(torch.equal, module.parameters(), net().parameters()))


@both_packages
@both_betas
@every_class
def test_a_modules_own_configure_optimizers(cls, beta, pl):
    def make(params):
        return cls(params, lr=0.05, beta=beta)

    module = lit(make, pl=pl)
    trainer = fit(module, pl=pl)
    assert type(trainer.optimizers[0]) is cls and trained(module)
    assert same(module, by_hand(make))


def test_manual_optimization_of_two_optimizers():
    def configure_optimizers(self):
        return [cls(layer.parameters(), lr=0.05) for cls, layer in ((Sadam, self.net[0]), (SAMSGradW, self.net[3]))]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        value = loss(self.net, batch)
        first.zero_grad()
        self.manual_backward(value)
        assert first.step() is None
        self.untoggle_optimizer(first)

        def closure():
            second.zero_grad()
            value = loss(self.net, batch)
            self.manual_backward(value)
            return value

        assert torch.equal(second.step(closure), loss(self.net, batch)) == (second.param_groups[0]["lr"] == 0)

    module = lit(configure_optimizers=configure_optimizers, training_step=training_step)
    module.automatic_optimization = False
    fit(module)
    alone = net()
    first, second = Sadam(alone[0].parameters(), lr=0.05), SAMSGradW(alone[3].parameters(), lr=0.05)
    for batch in rows().split(BATCH):
        for optimizer in (first, second):
            alone.zero_grad()
            loss(alone, batch).backward()
            optimizer.step()
    assert same(module, alone)


@both_betas
def test_accumulation_equals_the_large_batch(beta):
    make = sadamw(beta=beta)
    module = lit(make)
    trainer = fit(module, accumulate_grad_batches=2)
    assert trainer.global_step == STEPS // 2
    for p, q in zip(module.parameters(), by_hand(make, batch=2 * BATCH).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(algorithm):
    module = lit(sadamw(beta=50.0))
    fit(module, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    clipped = by_hand(sadamw(beta=50.0), before_step=lambda params: clip(params, 0.1))
    assert same(module, clipped) and not same(module, by_hand(sadamw(beta=50.0)))


def precision(kind):
    if kind == "16-mixed":  # on a CPU Lightning takes the name for bf16-mixed
        return {"plugins": [L.plugins.MixedPrecision("16-mixed", "cpu")]}, torch.float16
    return {"precision": kind}, torch.bfloat16


@both_betas
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("kind", ["16-mixed", "bf16-mixed"])
def test_mixed_precision(kind, clip, beta):
    options, dtype = precision(kind)
    module = lit(sadamw(beta=beta))
    trainer = fit(module, gradient_clip_val=clip, **options)
    assert trainer.global_step == STEPS
    alone = net()
    optimizer = sadamw(beta=beta)(param_groups(alone))
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "16-mixed")
    for batch in rows().split(BATCH):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            value = loss(alone, batch)
        scaler.scale(value).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        scaler.step(optimizer)
        scaler.update()
    assert same(module, alone) and not same(module, by_hand(sadamw(beta=beta)))
    for p, q in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.02)


def test_bf16_true():
    module = lit(sadamw())
    trainer = fit(module, precision="bf16-true")
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in module.parameters())
    for state in trainer.optimizers[0].state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].dtype == torch.float32 and state["step"] == STEPS and state["beta"] > 0
    assert loss(module.net, rows().bfloat16()) < loss(net(), rows()) / 1.5


def recorder(weights):
    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            weights.append([p.detach().clone() for p in pl_module.parameters()])

    return Recorder()


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
@pytest.mark.parametrize("injected", [True, False])
def test_weight_averaging(name, injected):
    if not hasattr(L.callbacks, name):
        pytest.skip(f"this version of Lightning has no {name}")
    weights = []
    options = {"decay": 0.5} if name.startswith("EMA") else {}
    callbacks = [recorder(weights), getattr(L.callbacks, name)(**options)]
    if injected:
        module = lit(sadamw())
    else:
        module, callbacks = lit(torch.optim.SGD), [UseOptimizer(sadamw()), *callbacks]
    fit(module, callbacks=callbacks)
    plain = lit(sadamw())
    fit(plain)
    assert all(map(torch.equal, weights[-1], plain.parameters()))
    for i, p in enumerate(module.parameters()):
        each = [step[i] for step in weights]
        mean = each[0]
        for later in each[1:]:
            mean = 0.5 * (mean + later)
        torch.testing.assert_close(p, mean if name.startswith("EMA") else sum(each) / len(each))


def test_stochastic_weight_averaging():
    weights = []
    swa = L.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=1)
    module = lit(sadamw())
    trainer = fit(module, callbacks=[recorder(weights), swa], max_epochs=4)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.02, 0.02]
    for i, p in enumerate(module.parameters()):  # taken at the start of each epoch from the second on
        taken = [weights[epoch * STEPS - 1][i] for epoch in (1, 2, 3)]
        torch.testing.assert_close(p, sum(taken) / 3)


def test_the_names_of_the_learning_rate_monitor(tmp_path):
    monitor = L.callbacks.LearningRateMonitor(log_weight_decay=True, log_momentum=True)
    logger = L.loggers.CSVLogger(tmp_path)
    fit(lit(sadamw()), callbacks=[monitor], logger=logger, log_every_n_steps=1)
    names = ["lr-SadamW/pg1", "lr-SadamW/pg2"]
    assert list(monitor.lrs) == names
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {name + end for name in names for end in ("", "-weight_decay", "-momentum")} <= set(header)


@pytest.mark.parametrize("cls", [SadamW, torch.optim.AdamW])
def test_the_groups_of_two_models_under_the_learning_rate_monitor(cls, tmp_path):
    def configure_optimizers(self):
        return cls(param_groups(self.net[0]) + param_groups(self.net[3]), lr=0.01)

    monitor = L.callbacks.LearningRateMonitor()
    logger = L.loggers.CSVLogger(tmp_path)
    fit(lit(configure_optimizers=configure_optimizers), callbacks=[monitor], logger=logger, log_every_n_steps=1)
    assert list(monitor.lrs) == [f"lr-{cls.__name__}/pg{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_reach_every_step(tensor):
    def configure_optimizers(self):
        optimizer = SadamW(self.parameters(), lr=torch.tensor(0.05) if tensor else 0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = lit(configure_optimizers=configure_optimizers)
    trainer = fit(module)
    assert float(trainer.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0, abs=1e-7)
    alone = net()
    optimizer = SadamW(alone.parameters(), lr=torch.tensor(0.05) if tensor else 0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch in rows().split(BATCH):
        optimizer.zero_grad()
        loss(alone, batch).backward()
        optimizer.step(), scheduler.step()
    assert same(module, alone)


@both_packages
@both_betas
@every_class
def test_a_run_resumed_after_an_epoch_equals_one_that_went_through(cls, beta, pl, tmp_path):
    def make(params):
        return cls(params, lr=0.05, beta=beta)

    through = lit(make, pl=pl)
    fit(through, pl=pl, max_epochs=3)
    path = tmp_path / "one.ckpt"
    first = fit(lit(make, pl=pl), pl=pl, max_epochs=1)
    first.save_checkpoint(path)
    torch.load(path, weights_only=True)
    resumed = lit(make, pl=pl, module=nn.Sequential(*net()).apply(lambda m: [p.data.zero_() for p in m.parameters()]))
    trainer = fit(resumed, pl=pl, max_epochs=3, ckpt_path=path)
    assert trainer.global_step == 3 * STEPS and same(resumed, through)


def test_a_checkpoint_of_adamw_is_taken_up(tmp_path):
    path = tmp_path / "adamw.ckpt"
    first = fit(lit(lambda params: torch.optim.AdamW(params, lr=0.05)))
    first.save_checkpoint(path)
    moments = [state["exp_avg"].clone() for state in first.optimizers[0].state.values()]
    seen = []
    module = lit(
        sadamw(),
        on_train_start=lambda self: seen.extend(s["exp_avg"].clone() for s in self.optimizers().state.values()),
    )
    trainer = fit(module, max_epochs=2, ckpt_path=path)
    assert seen and all(map(torch.equal, seen, moments))
    assert all(beta > 0 for beta in chosen_betas(trainer.optimizers[0]).values())


def test_the_learning_rate_finder():
    class Lit(type(lit(sadamw()))):
        lr = 1e-3

        def configure_optimizers(self):
            return SadamW(param_groups(self), lr=self.lr)

    module = Lit()
    trainer = L.Trainer(**{**QUIET, "max_epochs": 8})
    found = L.tuner.Tuner(trainer).lr_find(module, num_training=30, min_lr=1e-5, max_lr=1e-1)
    assert len(found.results["lr"]) == 30 and found.suggestion() == module.lr
    assert same(module, net())  # put back
    trainer.fit(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr and trained(module)


def test_a_compiled_module():
    module = lit(sadamw())
    fit(torch.compile(module, backend="eager"))
    assert same(module, by_hand(sadamw()))


def test_layers_thawed_later_take_the_optimizers_settings():
    class Thaw(L.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=10)

    module = lit(sadamw(weight_decay=0.3))
    trainer = fit(module, max_epochs=2, callbacks=[Thaw()])
    decay, _, added = trainer.optimizers[0].param_groups
    assert added["lr"] == decay["lr"] / 10 and added["beta"] == "auto" and added["weight_decay"] == 0.3
    assert trained(module) and all(beta > 0 for beta in chosen_betas(trainer.optimizers[0]).values())


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_training_step_that_returns_none_is_a_step_without_gradients(skipped, recwarn):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == skipped else loss(self.net, batch)

    module = lit(sadamw(beta=50.0), training_step=training_step)
    fit(module)
    alone = net()
    optimizer = sadamw(beta=50.0)(param_groups(alone))
    for i, batch in enumerate(rows().split(BATCH)):
        if i != skipped:
            optimizer.zero_grad()
            loss(alone, batch).backward()
            optimizer.step()
    assert same(module, alone)
    assert sum("nothing was updated" in str(w.message) for w in recwarn) == (skipped == 0)


FABRICS = ["lightning.fabric" if name.startswith("lightning.") else "lightning_fabric" for name in PACKAGES]


@pytest.mark.parametrize("fabric", FABRICS)
@both_betas
def test_fabric(fabric, beta, tmp_path):
    Fabric = importlib.import_module(fabric).Fabric
    fabric = Fabric(accelerator="cpu", devices=1)

    def setup():
        module = net()
        return fabric.setup(module, sadamw(beta=beta)(param_groups(module)))

    def run(module, optimizer, batches, by_closure=False):
        def closure():
            optimizer.zero_grad()
            value = loss(module, batch)
            fabric.backward(value)
            fabric.clip_gradients(module, optimizer, max_norm=0.5)
            return value

        for batch in batches:
            before = loss(module, batch)
            value = optimizer.step(closure) if by_closure else (closure(), optimizer.step())[0]
            assert torch.equal(value, before)

    module, optimizer = setup()
    assert isinstance(optimizer, SadamW)
    batches = rows().split(BATCH)
    run(module, optimizer, batches[:2])
    fabric.save(tmp_path / "state", {"module": module, "optimizer": optimizer, "steps": 2})
    run(module, optimizer, batches[2:], by_closure=True)

    clipped = by_hand(sadamw(beta=beta), before_step=lambda params: nn.utils.clip_grad_norm_(params, 0.5))
    assert same(module, clipped)
    assert chosen_betas(optimizer) == chosen_betas(optimizer.optimizer)
    resumed, restored = setup()
    fabric.load(tmp_path / "state", {"module": resumed, "optimizer": restored})
    run(resumed, restored, batches[2:])
    assert same(module, resumed)


@both_packages
@every_class
def test_use_optimizer_trains_a_foreign_module_on_decay_groups(cls, pl):
    def make(params):
        return cls(params, lr=0.05, weight_decay=0.3)

    module = lit(torch.optim.SGD, pl=pl)
    own = module.configure_optimizers
    trainer = fit(module, pl=pl, callbacks=[UseOptimizer(make)])
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is cls
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert same(module, by_hand(make)) and trained(module)
    assert module.configure_optimizers == own and "configure_optimizers" not in vars(module)


def test_use_optimizer_is_sadamw_if_nothing_else_is_said():
    (optimizer,) = fit(lit(torch.optim.SGD), callbacks=[UseOptimizer()]).optimizers
    assert type(optimizer) is SadamW and optimizer.param_groups[0]["weight_decay"] == 0.01


def test_use_optimizer_again_and_after_an_error():
    def broken(self):
        raise ArithmeticError("on_fit_start")

    callback = UseOptimizer(sadamw())
    module = lit(torch.optim.SGD)
    for _ in range(2):
        assert type(fit(module, callbacks=[callback]).optimizers[0]) is SadamW
    assert type(fit(module).optimizers[0]) is torch.optim.SGD
    failing = lit(torch.optim.SGD, on_fit_start=broken)
    with pytest.raises(ArithmeticError):
        fit(failing, callbacks=[callback])
    assert "configure_optimizers" not in vars(failing)
    copy.deepcopy(callback)


def test_use_optimizer_leaves_evaluation_alone():
    module = lit(torch.optim.SGD, test_step=lambda self, batch, batch_idx: None)
    module.test_dataloader = module.train_dataloader
    L.Trainer(**QUIET, callbacks=[UseOptimizer()]).test(module, verbose=False)
    assert "configure_optimizers" not in vars(module)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1.0)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def with_scheduler(form):
    def configure_optimizers(self):
        optimizer = sgd(self)
        scheduler = step_lr(optimizer)
        return {
            "dict": {"optimizer": optimizer, "lr_scheduler": scheduler},
            "dict of dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}},
            "lists": ([optimizer], [scheduler]),
            "lists with a dict": ([optimizer], [{"scheduler": scheduler}]),
            "list and scheduler": ([optimizer], scheduler),
            "list of a dict": [{"optimizer": optimizer, "lr_scheduler": scheduler}],
        }[form]

    return configure_optimizers


@pytest.mark.parametrize(
    "form", ["dict", "dict of dict", "lists", "lists with a dict", "list and scheduler", "list of a dict"]
)
def test_use_optimizer_says_that_it_drops_a_scheduler(form):
    module = lit(configure_optimizers=with_scheduler(form))
    with pytest.warns(UserWarning, match=r"scheduler of Lit\.configure_optimizers \(StepLR\) is dropped.*subclass"):
        trainer = fit(module, callbacks=[UseOptimizer(sadamw())])
    assert not trainer.lr_scheduler_configs and same(module, by_hand(sadamw()))


def test_use_optimizer_refuses_a_deepspeed_configuration_with_an_optimizer_of_its_own():
    def set_up(module, **config):
        UseOptimizer().setup(SimpleNamespace(strategy=SimpleNamespace(config=config)), module, "fit")

    module = lit(torch.optim.SGD)
    with pytest.raises(ValueError, match="would train with AdamW without calling configure_optimizers: remove"):
        set_up(module, optimizer={"type": "AdamW"}, zero_optimization={})
    assert "configure_optimizers" not in vars(module)
    set_up(module, zero_optimization={})
    assert "configure_optimizers" in vars(module)


@pytest.mark.filterwarnings("error:UseOptimizer")
@pytest.mark.parametrize(
    "own", [lambda self: None, sgd, lambda self: [sgd(self)], lambda self: {"optimizer": sgd(self)}],
    ids=["None", "optimizer", "list", "dict"],
)  # fmt: skip
def test_use_optimizer_without_a_scheduler_warns_of_nothing(own):
    module = lit(configure_optimizers=own)
    fit(module, callbacks=[UseOptimizer(sadamw())])
    assert same(module, by_hand(sadamw()))


@pytest.mark.parametrize(
    "own",
    [lambda self: [sgd(self), sgd(self)], lambda self: ([sgd(self), sgd(self)], []),
     lambda self: [{"optimizer": sgd(self)}, {"optimizer": sgd(self)}]],
    ids=["list", "lists", "dicts"],
)  # fmt: skip
def test_use_optimizer_refuses_a_module_with_several(own):
    module = lit(configure_optimizers=own)
    with pytest.raises(ValueError, match=r"Lit\.configure_optimizers returns 2 optimizers \(SGD, SGD\).*subclass"):
        fit(module, callbacks=[UseOptimizer()])
    assert same(module, net()) and "configure_optimizers" not in vars(module)


def test_without_lightning_the_error_names_the_extra():
    code = "import sys; sys.modules.update(lightning=None, pytorch_lightning=None); import sadam_integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ImportError: sadam_integrations.lightning needs Lightning" in done.stderr
    assert 'pip install "sadam-integrations[lightning]"' in done.stderr


@pytest.mark.parametrize("missing", PACKAGES)
def test_one_package_is_enough_but_an_error_within_it_is_shown(missing, monkeypatch):
    def import_module(name):
        if name == missing:
            raise ModuleNotFoundError(name=absent)
        return real(name)

    real, absent = importlib.import_module, missing.partition(".")[0]
    monkeypatch.setattr(importlib, "import_module", import_module)
    (found,) = integration._callbacks()
    assert found in UseOptimizer.__bases__ and len(UseOptimizer.__bases__) == len(PACKAGES)
    absent = "torchmetrics"  # what the package itself lacks
    with pytest.raises(ModuleNotFoundError):
        integration._callbacks()


def test_the_integration_does_without_lightnings_command_line():  # which needs more than Lightning alone
    assert not re.search(r"\bcli\b|jsonargparse\.", inspect.getsource(integration))
