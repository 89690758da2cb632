"""The benchmark of an optimizer step: what it pairs, what it counts, what it leaves out, what it writes."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch

from sadam_integrations import cli, recipe
from sadam_integrations.backends.cpu import instruction_set
from sadam_integrations.calibration import is_due
from sadam_integrations.plots.speed import speed_figure

BATCH = 2048
SPEED = recipe.load(recipe.recipes_folder() / "step_speed.py")


def run(tmp_path, *words):
    return cli.main(["run", "step_speed", "--smoke", "--output_dir", str(tmp_path / "run"), *words])


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_a_small_run_through_the_command_line(tmp_path, capsys):
    assert (
        run(tmp_path, "--threads", "1", "2", "--optimizers", "SadamW", "SAMSGradW", "AdamW fused", "AMSGrad fused") == 0
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = result["history"]["steps"]
    assert len(rows) == 5 * 2 * 4 and {row["setting"] for row in rows} == {"1 thread", "2 threads"}
    for row in rows:
        samsgrad, amsgrad = row["optimizer"] == "SAMSGradW", row["optimizer"] in ("SAMSGradW", "AMSGrad fused")
        assert row["baseline"] == ("AMSGrad fused" if samsgrad else "AdamW fused")
        assert row["bytes_per_parameter"] == pytest.approx(36 if amsgrad else 28, abs=0.3)
        low, high = row["quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert all(row[key] > 0 for key in ("milliseconds", "gb_per_s", "share_of_floor", "first_step_milliseconds"))
    assert result["recipe"] == "step_speed" and result["config"]["rounds"] == 3 and result["hardware"]["cpu"]
    assert result["metrics"]["instruction_set"] == instruction_set()
    out = capsys.readouterr().out
    assert "| ViT-S/16, cut, 2 threads | ratio | quartiles |" in out and "\n| SadamW | " in out
    assert f"instruction set of the CPU kernel: {instruction_set() or 'none'}" in out
    assert (tmp_path / "run" / "step_speed.png").read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path) == 2 and "holds a finished run" in capsys.readouterr().err


def test_the_tensors_are_those_of_the_models():
    from transformers import (
        BertConfig,
        BertModel,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    with torch.device("meta"):
        bert = BertModel(BertConfig())
        vit = ViTForImageClassification(ViTConfig(**small, num_labels=1000))
        resnet = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    for name, model in (("bert", bert), ("vit", vit), ("resnet", resnet), ("embeddings", bert.embeddings)):
        shapes = [tuple(p.shape) for p in model.parameters() if name != "embeddings" or p.dim() == 2]
        assert sorted(SPEED.WORKLOADS[name].shapes) == sorted(shapes)
    assert [len(workload.shapes) for workload in SPEED.WORKLOADS.values()] == [199, 200, 161, 2000, 3]


def test_convolutions_their_gradients_and_their_state_lie_channels_last():
    params = SPEED.Workload("", [(8, 4, 3, 3), (5, 7)], channels_last=True).tensors("cpu")
    for optimizer in (SPEED.prepare(SPEED.CONTESTANTS[name], params)[0] for name in ("SadamW", "AdamW fused")):
        for t in (params[0], params[0].grad, *(optimizer.state[params[0]][key] for key in ("exp_avg", "exp_avg_sq"))):
            assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_the_state_after_many_steps_is_what_many_steps_make():
    """Beside an optimizer that takes them: the rows that are subnormal, and those that never came."""
    workload = SPEED.Workload("", [(3000, 4)], steps=1500)
    params = workload.tensors("cpu")
    aged, _, _ = SPEED.prepare(SPEED.CONTESTANTS["AdamW fused"], params, workload)
    real = torch.optim.AdamW(params)
    steps = torch.arange(workload.steps).repeat_interleave(BATCH)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(1 / torch.arange(1.0, 3001), len(steps), True, generator=generator)
    for rows in tokens.view(workload.steps, BATCH):
        params[0].grad = torch.zeros(3000, 4)
        params[0].grad[rows] = torch.randn(3000, 4)[rows] * 1e-3
        real.step()
    for key, smallest in (("exp_avg", 1e-38), ("exp_avg_sq", 1e-12)):
        mine, theirs = (optimizer.state[params[0]][key].abs() for optimizer in (aged, real))
        assert torch.equal(mine == 0, theirs == 0)
        tiny = [((t > 0) & (t < smallest)).float().mean().item() for t in (mine, theirs)]
        assert tiny[0] == pytest.approx(tiny[1], abs=0.03), (key, tiny)
    assert (aged.state[params[0]]["exp_avg"].abs() > 0).float().mean() > 0.5


def test_a_ratio_is_of_the_times_of_one_round():
    machine = [1.0, 10.0, 1.0, 5.0, 2.0]  # how slow it happens to be
    own = [0.8 * slow for slow in machine]
    found = SPEED.paired([*own[:4], 2.0], machine)
    assert found["ratio"] == pytest.approx(0.8) and found["quartiles"] == pytest.approx([0.8, 0.8])
    assert found["milliseconds"] == pytest.approx(2000.0)
    assert SPEED.paired([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])["quartiles"] == [1.5, 2.5]
    with pytest.raises(ValueError):
        SPEED.paired([1.0, 2.0], [1.0])


def test_each_round_has_one_step_of_each_in_random_order(monkeypatch):
    order = []

    def timed(step, params):
        step()
        order.append(name := type(step.__self__).__name__)
        return {"wall": 0.5 if name == "SadamW" else 2.0}

    monkeypatch.setattr(SPEED, "timed", timed)
    params = SPEED.Workload("", [(8, 4), (3,)]).tensors("cpu")
    (row,) = SPEED.measure(SPEED.CONTESTANTS["SadamW"], params, 20, {"wall": 1.0})
    assert row["ratio"] == 0.25 and row["milliseconds"] == 500
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(rounds) == SPEED.WARM_UP + 20 and all(sorted(pair) == ["AdamW", "SadamW"] for pair in rounds)
    assert 3 < rounds.count(["AdamW", "SadamW"]) < 20
    assert row["gb_per_s"] == pytest.approx((35 * 28 + 2 * 2 * 4) / 0.5 / 1e9)


def test_beta_is_settled_and_not_measured_in_a_measured_step():
    params = SPEED.Workload("", [(8, 4)]).tensors("cpu")
    optimizer, step, _ = SPEED.prepare(SPEED.CONTESTANTS["SAMSGradW"], params)
    for _ in range(SPEED.WARM_UP + 30):
        step()
        (state,) = optimizer.state.values()
        assert state["beta"] > 0 and not is_due(int(state["step"]), state["beta"])


def test_packed_and_nested_states_are_counted_by_their_bytes():
    class Packed(torch.Tensor):
        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    packed = torch.zeros(64).as_subclass(Packed)
    packed.codes, packed.scale = torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    assert SPEED.stored({"m": packed, "more": [torch.zeros(4, dtype=torch.bfloat16)], "step": 3}) == 64 + 8 + 8


def test_what_cannot_be_measured_is_left_out_with_a_line(tmp_path, capsys, monkeypatch):
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("only on a GPU\nand more")

    library = ModuleType("broken_library")
    library.AdamW = Broken
    monkeypatch.setitem(sys.modules, "broken_library", library)
    kinds = {"missing": "no_such_library.AdamW", "broken": "broken_library.AdamW", "SadamW": "sadamw"}
    contestants = {name: SPEED.Contestant(dotted) for name, dotted in kinds.items()}
    contestants["compiled"] = SPEED.Contestant("sadamw", compiled="here")
    contestants["AdamW fused"] = SPEED.CONTESTANTS["AdamW fused"]
    monkeypatch.setattr(SPEED, "CONTESTANTS", contestants)
    config = SPEED.Config(
        output_dir=str(tmp_path / "run"), smoke=True, rounds=3, threads=[1], workloads=["vit", "tiny"]
    )
    result = SPEED.run(config)
    assert [row["optimizer"] for row in result["history"]["steps"]] == ["SadamW", "AdamW fused"] * 2
    out = capsys.readouterr().out
    assert "skipped: missing: optimizer 'no_such_library.AdamW' cannot be imported" in out
    assert "skipped: broken: only on a GPU\n" in out and out.count("skipped: broken") == 1
    assert "skipped: compiled: it takes long to compile: give --compiled" in out
    assert list(result["metrics"]["skipped"]) == ["missing", "compiled", "broken"]


def test_a_failure_of_our_own_or_of_torch_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(SPEED, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SPEED.run(SPEED.Config(output_dir=str(tmp_path / "run"), smoke=True, rounds=3))


@pytest.mark.skipif(not (instruction_set()), reason="the package was built without the CPU kernel")
def test_an_instruction_set_can_be_forced(tmp_path, capsys):
    best = instruction_set()
    words = ("--threads", "1", "--workloads", "tiny", "--optimizers", "SadamW")
    assert run(tmp_path, *words, "--instruction_set", "baseline") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["instruction_set"] == "baseline" and instruction_set() == best
    assert run(tmp_path, *words, "--overwrite", "--instruction_set", "mmx") == 2
    assert "'mmx'" in capsys.readouterr().err and instruction_set() == best


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux tells about a process")
def test_extra_memory_sees_a_temporary():
    size, params = 64_000_000, SPEED.Workload("", [(2,)]).tensors("cpu")
    assert SPEED.extra_memory(lambda: torch.ones(size, dtype=torch.uint8), params) == pytest.approx(size, rel=0.05)
    assert SPEED.extra_memory(lambda: None, params) < size / 20


def test_an_optimizer_that_drops_the_gradients_gets_them_back():
    params, seen = SPEED.Workload("", [(4,), (3,)]).tensors("cpu"), []

    def step():
        seen.append([p.grad is not None for p in params])
        for p in params:
            p.grad = None

    for _ in range(3):
        SPEED.timed(step, params)
    assert seen == [[True, True]] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "2"], "rounds: 2 is not valid, it is from 3 to 9999"),
        (["--threads", "1", "0"], "threads: 0 is not valid, it is from 1 to 1024"),
        (["--threads", "1000000"], "threads: 1000000 is not valid"),
    ],
)
def test_bad_values_are_named(words, message, tmp_path, capsys):
    assert run(tmp_path, *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        SPEED.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in out for word in ("How to read it:", "of floor", "--instruction_set"))
    assert {f"--{key}" for key in SPEED.Config.__dataclass_fields__} <= set(out.replace("[", " ").split())
    assert SPEED.parse(["--smoke"]).output_dir == "runs/step_speed_smoke"
    assert SPEED.parse(["--overwrite", "true", "--smoke", "false"]) == SPEED.Config(overwrite=True)


def test_the_figure_takes_any_number_of_workloads_and_settings(tmp_path):
    row = {"optimizer": "SadamW", "ratio": 0.9, "quartiles": [0.85, 0.95]}
    for rows in ([], [{**row, "workload": w, "setting": s} for w in "ab" for s in "123456"]):
        speed_figure(rows, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
