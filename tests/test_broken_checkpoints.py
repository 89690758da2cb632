"""Checkpoints that are cut off, foreign, of another shape or version, or hold code: refused, and nothing is changed."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, chosen_betas, conversion, recipe
from sadam_integrations.backends import cpu

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_backend = pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"fused": True}, marks=pytest.mark.skipif(isinstance(cpu.load(), str), reason="no kernel")),
        {"fused": False, "foreach": False},
        {"foreach": True},
    ],
    ids=["kernel", "for-loop", "foreach"],
)
SHAPES = ((7,), (3, 4), ())


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, steps=5, seed=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-2
        optimizer.step()
    return params


def everything(optimizer):
    """Weights, state and groups, as values that compare with ``==``."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = [{k: str(v) for k, v in optimizer.state[p].items()} for p in params]
    return [p.tolist() for p in params], copy.deepcopy(groups), state, len(optimizer.state)


def refuse(optimizer, state_dict, match, error=ValueError):
    """Loads what has to be refused; the optimizer is as it was, and goes on as one that never saw it."""
    train(optimizer)
    group = optimizer.param_groups[0]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    other = type(optimizer)(copies, foreach=group["foreach"], fused=group["fused"])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, given = everything(optimizer), copy.deepcopy(state_dict)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(state_dict)
    assert everything(optimizer) == before and str(state_dict) == str(given)
    assert [p.tolist() for p in train(optimizer, seed=1)] == [p.tolist() for p in train(other, seed=1)]


# ---------------------------------------------------------------- what is no state dict of these parameters


def saved(cls=SadamW, shapes=SHAPES):
    optimizer = cls(parameters(shapes))
    train(optimizer, seed=2)
    return optimizer.state_dict()


def changed(change):
    state_dict = saved()
    change(state_dict)
    return state_dict


def edit(*path, value=None, drop=False):
    def change(state_dict):
        *inner, last = path
        for key in inner:
            state_dict = state_dict[key]
        if drop:
            del state_dict[last]
        else:
            state_dict[last] = value

    return change


FOREIGN = [
    (None, "a NoneType .* is not an optimizer's state dict"),
    ([], "a list .* is not an optimizer's state dict"),
    ({}, r"a dict \(nothing in it that is known\) is not an optimizer's state dict"),
    ({"state": {}}, r"a dict \(state\) is not"),
    ({"model": {}, "optimizer": saved()}, r"\(model, optimizer\) is not an optimizer's.*one part of what was saved"),
    (torch.nn.Linear(2, 2).state_dict(), r"a OrderedDict \(weight, bias\) is not"),
    (changed(edit("param_groups", value=None)), "param_groups is not a list of groups.*damaged"),
    (changed(edit("param_groups", 0, value=3)), "param_groups is not a list of groups.*damaged"),
    (changed(edit("param_groups", 0, "params", drop=True)), "param_groups is not a list of groups.*damaged"),
    (changed(edit("param_groups", 0, "params", value=[[0], [1]])), "param_groups is not a list of groups.*damaged"),
    (changed(edit("state", value=[1, 2])), "state is a list, not a dict.*damaged"),
    (changed(edit("state", 1, "step", value=10**400)), "parameter 1: step=1000.*damaged"),
    (changed(edit("state", 1, "step", value=torch.ones(1).to_sparse())), r"(?s)parameter 1: step=tensor.*damaged"),
    (changed(edit("state", 1, value=torch.zeros(2))), "parameter 1: a Tensor is not its state"),
    (changed(edit("state", 1, "step", value=torch.zeros(2))), r"parameter 1: step=tensor\(\[0., 0.\]\).*damaged"),
    (changed(edit("state", 1, "step", value=torch.tensor(float("inf")))), "parameter 1: step=inf.*damaged"),
    (changed(edit("state", 2, "exp_avg", value=torch.zeros(1))), r"exp_avg of parameter 2 has the shape \(1,\)"),
    (changed(edit("state", 0, "exp_avg_sq", value=torch.zeros(7).to_sparse())), "sparse_coo, not a dense one"),
]


@pytest.mark.parametrize(("state_dict", "match"), FOREIGN, ids=range(len(FOREIGN)))
def test_what_is_no_state_dict_of_these_parameters_is_refused(state_dict, match):
    refuse(SadamW(parameters()), state_dict, match)


@every_backend
@every_class
def test_moments_of_another_shape_are_refused_not_met_amid_a_step(cls, flags):
    other = saved(cls, ((7,), (4, 3), ()))
    refuse(
        cls(parameters(), **flags), other, r"exp_avg of parameter 1 has the shape \(4, 3\) and the parameter \(3, 4\)"
    )


def test_an_adam_state_of_another_shape_is_refused():
    adam = torch.optim.AdamW(parameters(((7,), (12,), ())))
    train(adam)
    refuse(SadamW(parameters()), adam.state_dict(), r"shape \(12,\) and the parameter \(3, 4\): the checkpoint is of")


def test_a_groups_values_of_another_type_are_refused():
    refuse(SadamW(parameters()), changed(edit("param_groups", 0, "lr", value="fast")), "'fast'", TypeError)


# ---------------------------------------------------------------- other versions


@every_backend
@every_class
def test_the_state_of_another_version_loads(cls, flags):
    newer = saved(cls)
    newer["param_groups"][0]["cautious"] = True
    newer["format"] = 9
    for state in newer["state"].values():
        state["shadow"] = torch.zeros(3)
        state["step"] = state["step"].view(1)
    older = copy.deepcopy(newer)
    for key in ("beta", "bias_correction", "capturable", "differentiable", "maximize"):
        del older["param_groups"][0][key]
    for state in older["state"].values():
        state["step"] = int(state["step"])
        state.pop("beta", None), state.pop("max_exp_avg_sq", None)
    for version in (newer, older):
        optimizer = cls(parameters(), **flags)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(copy.deepcopy(version))
        params = train(optimizer)
        assert optimizer.state[params[0]]["shadow"].shape == (3,) and optimizer.state[params[0]]["step"] == 10
        assert optimizer.state[params[0]]["step"].shape == () and all(p.isfinite().all() for p in params)


def test_the_state_of_a_parameter_that_is_in_no_group_comes_along():
    strange = changed(edit("state", "layer.weight", value=saved()["state"][0]))
    optimizer = SadamW(parameters())
    optimizer.load_state_dict(strange)
    train(optimizer)
    assert len(optimizer.state) == 4 and len(chosen_betas(optimizer)) == 3
    again = optimizer.state_dict()["state"]["layer.weight"]
    assert all(
        torch.equal(torch.as_tensor(again[key]), torch.as_tensor(value)) for key, value in saved()["state"][0].items()
    )


# ---------------------------------------------------------------- files


def offsets(size, count=60):
    """Where a file is cut off: anywhere, and at each of its last bytes."""
    return sorted({*random.Random(0).sample(range(size), count), *range(size - 40, size)})


@pytest.fixture
def optimizer_file(tmp_path):
    torch.save(saved(), tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


def test_a_file_that_is_cut_off_anywhere_is_refused(optimizer_file):
    whole, cut = optimizer_file.read_bytes(), optimizer_file.with_name("cut.pt")
    for offset in offsets(len(whole)):
        cut.write_bytes(whole[:offset])
        with pytest.raises(ValueError, match=r"not a file that torch\.save made, or a damaged one"):
            conversion.read_checkpoint(cut)
    cut.write_bytes(whole)
    assert len(conversion.read_checkpoint(cut)["state"]) == 3


def test_a_file_with_a_wrong_byte_is_refused_or_changes_nothing_but_values(optimizer_file):
    whole, wrong, refused = optimizer_file.read_bytes(), optimizer_file.with_name("wrong.pt"), 0
    numbers = random.Random(0)
    for offset in numbers.sample(range(len(whole)), 300):
        wrong.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << numbers.randrange(8)]) + whole[offset + 1 :])
        optimizer = SadamW(parameters())
        train(optimizer)
        before = everything(optimizer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.load_state_dict(torch.load(wrong, weights_only=True))
        except Exception:  # torch has no error of its own for a damaged file
            refused += 1
            assert everything(optimizer) == before
        else:
            train(optimizer)
    assert refused > 20


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(zipped, tmp_path, capsys):
    from sadam_integrations import cli

    file = tmp_path / "optimizer.pt"
    torch.save({**saved(), "x": Bomb(tmp_path / "ran")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds a posix.mkdir, which only running its code would make"):
        conversion.read_checkpoint(file)
    assert cli.main(["calibrate", str(file)]) == 2 and "posix.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    with file.open("rb") as stream, pytest.raises(Exception, match=r".*"):
        torch.load(stream, weights_only=False), pickle.load(stream)
    assert (tmp_path / "ran").exists() or not zipped  # it would have


SOURCES = [
    path for folder in (Path(conversion.__file__).parent, recipe.recipes_folder()) for path in folder.rglob("*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_loads_code_from_data(path):
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system"}
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name, words = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in forbidden, f"{path.name}:{call.lineno}: {name}"
        assert name != "torch.load" or words.get("weights_only") == "True", f"{path.name}:{call.lineno}"
        assert words.get("trust_remote_code", "False") == words.get("allow_pickle", "False") == "False"
        assert words.get("shell", "False") == "False"
