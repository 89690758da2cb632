"""Faults amid training: gradients that are no numbers, skipped steps, half precision, late parameters, a full disk."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import resource
import time

import pytest
import torch
from test_recipe import BERT, bert, csv_arguments, csv_files, tiny_model  # noqa: F401
from test_vit import TINY, VIT, vit, words  # noqa: F401

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, calibration, chosen_betas, recipe
from sadam_integrations.backends import cpu
from sadam_integrations.recipe import RecipeError

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_beta = pytest.mark.parametrize("beta", ["auto", 50.0])
every_backend = pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"fused": True}, marks=pytest.mark.skipif(isinstance(cpu.load(), str), reason="no kernel")),
        {"fused": False, "foreach": False},
        {"foreach": True},
    ],
    ids=["kernel", "for-loop", "foreach"],
)


def parameters(shapes=((5,), (3, 4)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, t, size=1e-2):
    generator = torch.Generator().manual_seed(t)
    return [(size * torch.randn(p.shape, generator=generator)).to(p.dtype) for p in params]


def take(optimizer, params, given):
    for p, gradient in zip(params, given, strict=True):
        p.grad = gradient
    optimizer.step()


def state(optimizer):
    return str([(k, p.tolist(), v) for p, s in optimizer.state.items() for k, v in s.items()])


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("at", [1, 3, 4], ids=["first step", "between measurements", "a measured step"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_backend
@every_class
def test_auto_recovers_from_a_bad_gradient_where_adam_does(cls, flags, bad, at):
    params, twins = parameters(), parameters()
    optimizer, adam = cls(params, **flags), torch.optim.AdamW(twins)
    for t in range(1, 70):
        given = gradients(params, t)
        if t == at:
            given[0][1] = given[1][2, 0] = bad
        take(optimizer, params, given), take(adam, twins, [g.clone() for g in given])
        if t == at:
            before = [p.detach().clone() for p in params]
    for p, twin, old in zip(params, twins, before, strict=True):
        assert torch.equal(p.isfinite(), twin.isfinite()) and p.isfinite().any()
        assert (p[p.isfinite()] != old[p.isfinite()]).all()  # the others go on
    betas, clean = chosen_betas(optimizer), cls(parameters(), **flags)
    others = [p for group in clean.param_groups for p in group["params"]]
    for t in range(1, 70):
        take(clean, others, gradients(others, t))
    for name, beta in chosen_betas(clean).items():
        assert beta / 2 < betas[name] < beta * 2  # measured again at step 64, as if nothing had been


@every_backend
@every_class
def test_a_beta_that_could_not_be_measured_is_measured_when_it_can_be(cls, flags):
    params = parameters()
    optimizer = cls(params, **flags)
    take(optimizer, params, [torch.full_like(p, math.inf) for p in params])
    assert set(chosen_betas(optimizer).values()) == {0.0}
    fresh = parameters(((5,),))
    optimizer.add_param_group({"params": fresh})
    take(optimizer, [*params, *fresh], gradients([*params, *fresh], 2))
    assert list(chosen_betas(optimizer).values())[:2] == [0.0, 0.0]  # as in Adam, these parameters are lost
    assert all(p.isnan().all() for p in params) and fresh[0].isfinite().all() and optimizer.state[fresh[0]]["beta"] > 0


@every_backend
@every_beta
@every_class
def test_a_step_that_the_scaler_skips_leaves_no_trace(cls, beta, flags):
    """The first step, one that beta is measured at, and two in a row."""
    params, twins = parameters(), parameters()
    optimizer, other = cls(params, beta=beta, **flags), cls(twins, beta=beta, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6)
    skipped, taken = {1, 4, 5, 9}, 0
    for t in range(1, 20):
        given = gradients(params, t)
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))  # makes the scaler ready
        before = state(optimizer)
        for p, gradient in zip(params, given, strict=True):
            p.grad = gradient * scale
        if t in skipped:
            params[0].grad[0] = math.inf
        scaler.step(optimizer), scaler.update()
        if t in skipped:
            assert state(optimizer) == before and scaler.get_scale() == scale / 2
        else:
            taken += 1
            take(other, twins, [gradient.clone() for gradient in given])
    assert taken == 15 and all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert state(optimizer) == state(other)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e3, 6e4], ids=lambda size: f"gradients of {size:g}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_backend
@every_class
def test_true_half_precision_makes_no_nan(cls, flags, dtype, size):
    """Of v, 1e-7 underflows and 6e4 overflows in float16: such a coordinate stops, as in Adam."""
    params = parameters(dtype=dtype)
    optimizer = cls(params, lr=1e-2, **flags)
    for t in range(1, 40):
        take(optimizer, params, [g.clamp(-size, size) for g in gradients(params, t, size)])
    for p in params:
        kept = optimizer.state[p]
        assert p.isfinite().all() and p.dtype == kept["exp_avg"].dtype == kept["exp_avg_sq"].dtype == dtype
        assert math.isfinite(kept["beta"])


# ---------------------------------------------------------------- late parameters, long runs


@every_backend
@every_beta
@every_class
def test_a_group_that_is_added_late_starts_as_a_new_optimizer_would(cls, beta, flags):
    early, late, alone = parameters(), parameters(((6,), (2, 2))), parameters(((6,), (2, 2)))
    optimizer = cls(early, beta=beta, **flags)
    for t in range(1, 101):
        take(optimizer, early, gradients(early, t))
    optimizer.add_param_group({"params": late, "lr": 0.02})
    other = cls(alone, lr=0.02, beta=beta, **flags)
    for t in range(101, 140):
        given = gradients(late, t)
        take(optimizer, [*early, *late], [*gradients(early, t), *given])
        take(other, alone, [gradient.clone() for gradient in given])
    assert all(torch.equal(p, q) for p, q in zip(late, alone, strict=True))
    assert [optimizer.state[p]["step"].item() for p in (*early, *late)] == [139.0] * 2 + [39.0] * 2


@every_backend
@every_beta
@every_class
def test_a_first_gradient_at_step_1000_starts_that_parameter_as_new(cls, beta, flags):
    params, alone = parameters(), parameters()[1:]
    optimizer, other = cls(params, beta=beta, **flags), cls(alone, beta=beta, **flags)
    for t in range(1, 1000):
        params[0].grad = gradients(params, t)[0]
        optimizer.step()
    for t in range(1000, 1040):
        given = gradients(params, t)
        take(optimizer, params, given), take(other, alone, [given[1].clone()])
    assert torch.equal(params[1], alone[0]) and optimizer.state[params[1]]["step"] == 40


@every_backend
@every_class
def test_the_step_count_ends_at_float32s_last_whole_number_and_nothing_else_does(cls, flags, monkeypatch):
    params = parameters()
    optimizer = cls(params, **flags)
    take(optimizer, params, gradients(params, 1))
    for p in params:
        optimizer.state[p]["step"].fill_(2.0**24 - 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    measured = []
    monkeypatch.setattr(
        calibration, "measure", lambda histograms, factors: [measured.append(1) or 3.0 for _ in histograms]
    )
    for t in range(2, 12):
        before = [p.detach().clone() for p in params]
        take(optimizer, params, gradients(params, t))
        assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert len(measured) == len(params) and optimizer.state[params[0]]["step"] == 2.0**24


# ---------------------------------------------------------------- disks and folders


@pytest.fixture
def small_disk():
    """A function after whose call no file can grow beyond 20 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=20_000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_vit_on_a_full_disk_says_so_and_goes_on_when_there_is_room(vit, tmp_path, small_disk, monkeypatch, capsys):  # noqa: F811
    arguments = words(output_dir=tmp_path / "run", **TINY, train_size=64, eval_size=20, epochs=3)
    save = vit.training.EpochCheckpoint.on_train_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(
            vit.training.EpochCheckpoint,
            "on_train_epoch_end",
            lambda self, trainer, module: (trainer.current_epoch and small_disk(), save(self, trainer, module))[0],
        )
        assert vit.main(arguments) == 2
        small_disk(resource.RLIM_INFINITY)
    error = capsys.readouterr().err
    assert re.search(r"error: output_dir: .*run cannot be written to \(File too large\)", error), error
    assert "Traceback" not in error and "Traceback" in (tmp_path / "run" / "log.txt").read_text()
    assert vit.main(arguments) == 0 and "Resuming from" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("full", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_bert_on_a_full_disk_says_so_and_goes_on(
    bert, tiny_model, csv_files, tmp_path, small_disk, monkeypatch, capsys, full  # noqa: F811
):  # fmt: skip
    import transformers

    arguments = [*map(str, csv_arguments(tiny_model, csv_files, tmp_path / "run")), "--train_size", "32", "--epochs=2"]
    where = {"model.safetensors": "_save_checkpoint", "optimizer.pt": "_save_optimizer_and_scheduler"}
    name = where.get(full, "_save_rng_state")
    save = getattr(transformers.Trainer, name)

    def cut_short(self, *args, **kwargs):
        if self.state.global_step > 2:
            if full == "trainer_state.json":
                save(self, *args, **kwargs)
            small_disk(100 if full == "trainer_state.json" else 20_000)
            if full == "trainer_state.json":
                return None
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, name, cut_short)
        code = bert.main(arguments)
        small_disk(resource.RLIM_INFINITY)
    error = capsys.readouterr().err
    assert code == 2 and re.search(r"error: output_dir: .*run cannot be written to \(", error), error
    assert "Traceback" not in error
    assert bert.main(arguments) == 0
    assert re.search("Resuming from .*checkpoint-[12]\n", capsys.readouterr().out)


def as_nobody(function):
    """Runs a function in a process that may not write everywhere, as root may; returns what it raised, as text."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            function()
            os.write(writer, b"nothing")
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.wait()
    return said


@pytest.mark.parametrize("there", [False, True], ids=["to be made", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(bert, tmp_path, there):  # noqa: F811
    folder = tmp_path / "run"
    if there:
        folder.mkdir(mode=0o555)
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == tmp_path.owner() and path != path.parent:
            path.chmod(path.stat().st_mode | 0o555 if path != tmp_path else 0o555)
    config = recipe.parse(bert.Config, ["--output_dir", str(folder)], "", BERT.with_suffix(".yaml"))
    said = as_nobody(lambda: recipe.open_run(config, BERT))
    tmp_path.chmod(0o755)
    assert re.match(rf"(RecipeError|PermissionError): .*{re.escape(str(folder))}", said), said
    assert not folder.exists() or not list(folder.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(bert, csv_files, tiny_model, tmp_path, monkeypatch, capsys):  # noqa: F811
    import datasets

    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    assert bert.main([*map(str, csv_arguments(tiny_model, csv_files, tmp_path / "run"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path / "file") in error and error.count("\n") == 1


def test_of_processes_that_start_at_once_one_gets_the_folder(bert, tmp_path):  # noqa: F811
    config = recipe.parse(bert.Config, ["--output_dir", str(tmp_path / "run")], "", BERT.with_suffix(".yaml"))
    begin = time.time() + 0.5
    children = []
    for _ in range(6):
        if (child := os.fork()) == 0:
            code = 1
            try:
                time.sleep(max(0.0, begin - time.time()))
                recipe.open_run(config, BERT)
                code = 0
                time.sleep(3)
            except RecipeError as error:
                code = 2 if "another process is running" in str(error) else 1
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 2, 2, 2, 2, 2]


# ---------------------------------------------------------------- checkpoints of recipes that are not whole


def test_a_checkpoint_without_the_random_states_of_all_processes_is_not_complete(tmp_path, monkeypatch):
    from sadam_integrations.huggingface.training import last_checkpoint

    for step, files in ((1, (0, 1)), (2, (0,))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for i in files:
            torch.save({}, folder / f"rng_state_{i}.pth")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    torch.save({}, tmp_path / "checkpoint-2" / "rng_state_1.pth")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    os.truncate(tmp_path / "checkpoint-2" / "rng_state_1.pth", 500)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_checkpoint_that_was_damaged_later_is_named(tmp_path, name):
    from safetensors.torch import save_file

    from sadam_integrations.huggingface.training import last_checkpoint

    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    for file in ("optimizer.pt", "scheduler.pt"):
        torch.save({"x": torch.zeros(1000)}, folder / file)
    save_file({"x": torch.zeros(1000)}, folder / "model.safetensors")
    assert last_checkpoint(tmp_path) == str(folder)
    whole = (folder / name).read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(RecipeError, match=f"{name} is damaged: give --overwrite true"):
            last_checkpoint(tmp_path)


def test_code_in_a_vit_checkpoint_is_not_run(vit, tmp_path, capsys):  # noqa: F811
    from test_broken_checkpoints import Bomb

    arguments = words(output_dir=tmp_path / "run", **TINY, train_size=64, eval_size=20, epochs=1)
    recipe.open_run(recipe.parse(vit.Config, arguments, "", VIT.with_suffix(".yaml")), VIT)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, checkpoint)
    assert vit.main(arguments) == 2 and not (tmp_path / "ran").exists()
    assert "last.ckpt holds code, which is not run: give --overwrite true" in capsys.readouterr().err
