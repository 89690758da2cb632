"""Rows: building an optimizer, its steps, and loading a checkpoint into it."""

from __future__ import annotations

import math

import torch

from errors import Row
from errors.provoking import build, load, one
from sadam_integrations import Sadam, SadamW, create_optimizer, param_groups


def changed(key, value):
    """Changes a checkpoint's state of a parameter."""
    return lambda saved: saved["state"][0].update({key: value})


AS_IN_ADAMW = {"weight_decay": 0.1, "decoupled_weight_decay": True}


def without_moments(saved):
    saved["state"][0] = {"momentum_buffer": torch.zeros(3)}


BUILDING = [
    Row(
        "Tensor lr must be 1-element",
        build(lr=torch.ones(2)),
        "`lr` is a tensor with several numbers.",
        "Give a float or `torch.tensor(1e-3)`; a learning rate for each group goes into the groups.",
    ),
    Row(
        "Invalid learning rate: <value>: lr is at least",
        build(lr=torch.tensor(-1.0)),
        "`lr` is a tensor that is negative, infinite or not a number.",
        "Give a learning rate of 0 or more.",
    ),
    Row(
        "lr as a Tensor is not supported",
        build(lr=torch.tensor(0.1), foreach=True),
        "`foreach=True` was asked for with a tensor `lr`, which it reads on the CPU.",
        "Leave `foreach=None`, or set `capturable=True`.",
    ),
    Row(
        "lr is a number or a 0-dim tensor",
        build(lr="1e-3"),
        "`lr` is a text, a bool or `None`; YAML reads `1e-3` as a text, and `1.0e-3` as a number.",
        "Give a float.",
    ),
    Row(
        "Invalid learning rate: <lr>: lr is at least",
        build(lr=math.nan),
        "`lr` is negative, infinite or not a number.",
        "Give a learning rate of 0 or more; look at the scheduler or the sweep that computed it.",
    ),
    Row(
        "is not a pair of numbers such as",
        build(betas=0.9),
        "`betas` is one number, or has not exactly two.",
        "Give `betas=(0.9, 0.999)`.",
    ),
    Row(
        "betas are two plain numbers",
        build(betas=(0.9, "x")),
        "One of `betas` is a text, a bool, or a tensor with several numbers.",
        "Give two floats.",
    ),
    Row("each of betas is in [0, 1)", build(betas=(1.0, 0.9)), "One of `betas` is out of its range.", "Lower it."),
    Row(
        "did you mean betas=",
        build(beta=(0.9, 0.95)),
        "The momentum pair of Adam was given as `beta`, the sharpness of the softplus.",
        "Call it `betas`.",
    ),
    Row(
        'beta is a positive number or "auto"',
        build(beta="50"),
        "`beta` is a text other than `auto`, a bool, several numbers or `None`.",
        'Give a number or `"auto"`.',
    ),
    Row(
        "beta is at least",
        build(beta=-50.0),
        "`beta` is zero, negative, not a number, or out of float32's range.",
        'Give a positive number or `"auto"`.',
    ),
    Row("weight_decay is a number", build(weight_decay="0.1"), "`weight_decay` is a text or a bool.", "Give a float."),
    Row(
        "weight_decay is at least 0",
        build(weight_decay=-0.1),
        "`weight_decay` is negative, infinite or not a number.",
        "Give 0 or more.",
    ),
    Row(
        "Invalid bias_correction: ",
        build(bias_correction="middle"),
        "`bias_correction` is none of the forms there are.",
        "Leave it out, or give one of those that the message lists.",
    ),
    Row(
        'needs bias_correction="inner"',
        build(bias_correction="outer"),
        "A published form was asked for, and `beta` was left to be measured, which only the inner form has.",
        "Give `beta` a number, as in `Sadam(params, **PUBLISHED)`.",
    ),
    Row("is not True or False", build(maximize="no"), "A flag is neither `True` nor `False`.", "Give one of them."),
    Row(
        "foreach=True cannot be differentiated",
        build(foreach=True, differentiable=True),
        "`differentiable=True` runs in plain torch, parameter by parameter.",
        "Leave `foreach=None`.",
    ),
    Row(
        "fused=True and foreach=True exclude",
        build(fused=True, foreach=True),
        "Two ways of computing the step were asked for.",
        "Leave one of them, or both, at `None`.",
    ),
    Row(
        "fused=True cannot be differentiated",
        build(fused=True, differentiable=True),
        "Kernels have no backward pass.",
        "Leave `fused=None`.",
    ),
    Row(
        "param_group must be a dict",
        lambda place: Sadam([one()]).add_param_group([one()]),
        "`add_param_group` got something else, such as a list of parameters.",
        'Give `{"params": [...]}`.',
    ),
    Row(
        "param_groups: got",
        lambda place: param_groups([one()]),
        "`param_groups` got parameters; the layers say which of them are not decayed.",
        "Give the model.",
    ),
    Row(
        "param_groups: nothing to train",
        lambda place: param_groups(torch.nn.Identity()),
        "The model has no parameters, or all are frozen.",
        "Build the optimizer after the model, and unfreeze what is to be trained.",
    ),
    Row(
        "unknown optimizer",
        lambda place: create_optimizer("sadamv", [one()]),
        "The name is none that `list_optimizers()` has.",
        "Take the nearest one that the message names, or the dotted path of a class.",
    ),
    Row(
        "cannot be imported: ",
        lambda place: create_optimizer("no.such.Thing", [one()]),
        "The module of a dotted path is not installed, not in the path, or fails while it is imported.",
        "Install it, or correct the path; modules in the current folder are found by the `sadam` command.",
    ),
    Row(
        "is not a subclass of torch.optim.Optimizer",
        lambda place: create_optimizer("math.pi", [one()]),
        "The dotted path leads to something else.",
        "Give the path of the class.",
    ),
    Row(
        "the name comes first",
        lambda place: create_optimizer([one()], "sadamw"),
        "The arguments are in the wrong order.",
        '`create_optimizer("sadamw", model, lr=1e-3)`.',
    ),
    Row(
        "create_optimizer: <class> has no argument",
        lambda place: create_optimizer("sadamw", [one()], betta=1),
        "A keyword is misspelt, or another optimizer's (`eps`).",
        "Take one of those that the message lists.",
    ),
    Row(
        "<name> has no argument <key><…>",
        lambda place: Sadam([one()], eps=1e-8),
        "A keyword is misspelt, or another optimizer's (`eps`).",
        "Take one of those that the message lists.",
    ),
    Row(
        "pass model.parameters()",
        lambda place: Sadam(torch.nn.Linear(2, 2)),
        "A model was given where parameters are taken.",
        "Give `model.parameters()`, `param_groups(model)`, or the model to `create_optimizer`.",
    ),
    Row(
        "has no softplus beta",
        "test_auto.py::test_chosen_betas_are_named_and_reading_them_changes_nothing",
        "The chosen betas of an optimizer of another package were asked for.",
        "Ask it of Sadam, SAMSGrad, SadamW or SAMSGradW.",
    ),
    Row(
        "instruction_set=",
        "test_cpu_kernel.py::test_the_best_instruction_set_of_this_machine_runs",
        "The instruction set that was asked for is not one of this processor's.",
        "Leave it out: the best one is found.",
    ),
    Row(
        "fused=True: a parameter is on",
        lambda place: SadamW([torch.nn.Parameter(torch.ones(3, device="meta"))], fused=True),
        "A kernel was asked for, and there is none here for the device: the message says why.",
        "Leave `fused=None`; `sadam env` shows how a step is computed.",
    ),
]

STEPPING = [
    Row(
        "does not support sparse gradients",
        "test_bad_input.py::test_a_sparse_gradient_changes_nothing_in_any_group",
        "An embedding was built with `sparse=True`.",
        "Build it without, or give its parameters to `torch.optim.SparseAdam`.",
    ),
    Row(
        "has none of the parameters that",
        "test_bad_input.py::test_an_optimizer_built_before_its_modules_parameters_were_replaced",
        "The optimizer was built before FSDP, `.to(...)` or a wrapper replaced the model's parameters.",
        "Build the optimizer after that.",
    ),
    Row(
        "nothing was updated, because no parameter has a gradient",
        "test_bad_input.py::test_an_optimizer_built_before_its_modules_parameters_were_replaced",
        "`step()` found no gradient at all: there was no backward pass, or it went to other parameters.",
        "Call `backward()` first; build the optimizer after the model was wrapped or moved.",
    ),
    Row(
        "of the coordinates on the floor of the denominator",
        "test_floor_warning.py::test_what_it_says",
        "`beta` is so small for these gradients that nearly every coordinate moves as under momentum SGD.",
        'Give `beta="auto"`, or the beta or the learning rate that the message names.',
    ),
    Row(
        "is not measured again under",
        "test_auto.py::test_graph_capture_reads_nothing_and_warns",
        "The step was compiled or captured in a CUDA graph before beta had settled.",
        "Take the ordinary steps that the message asks for first, or give `beta` a number.",
    ),
    Row(
        "measures one beta for each flat tensor",
        "test_auto.py::test_flat_parameters_of_fsdp1_are_measured_and_that_is_said_once",
        "FSDP1 with `use_orig_params=False`, and DeepSpeed's ZeRO, lay several parameters end to end into one tensor.",
        "Give FSDP1 `use_orig_params=True`, shard with `fully_shard` (FSDP2), or give `beta` a number.",
    ),
    Row(
        "record of a parameter was not found",
        "test_distributed.py::test_fsdp1_behind_a_frozen_garbage_collector",
        "The garbage collector, which leads from a parameter of FSDP1 to its shards, was told to forget what there is.",
        "Call `gc.freeze()` after the first step; or give `beta` a number.",
    ),
    Row(
        "has been freed",
        "test_cpu_kernel.py::test_freed_memory_is_an_error",
        "Something resized the storage of a parameter, its gradient or its state to nothing between two steps.",
        "Restore the storage before `step()`, as FSDP does, or leave the freeing to the engine.",
    ),
]

LOADING = [
    Row(
        "is not a count of steps: the checkpoint",
        load(changed("step", torch.tensor(-1.0))),
        "The file is damaged, or another program changed it.",
        "Load an older checkpoint.",
    ),
    Row(
        "not a tensor: the checkpoint is damaged",
        load(changed("exp_avg", "none")),
        "The file is damaged, or was not made by an optimizer of Adam's kind.",
        "Load an older checkpoint.",
    ),
    Row(
        "is not a number of 0 or more",
        load(changed("beta", "auto")),
        "The beta that was measured is damaged.",
        "Load an older checkpoint, or remove the state's `beta`: it is then measured again.",
    ),
    Row(
        "is not an optimizer's state dict",
        load(lambda saved: saved.pop("state")),
        "It is a whole checkpoint, of which the optimizer is one part, or the weights alone.",
        "Pass the part that `optimizer.state_dict()` returned.",
    ),
    Row(
        "not a dict: the checkpoint is damaged",
        load(lambda saved: saved.update(state=[1])),
        "The file is damaged, or another program changed it.",
        "Load an older checkpoint.",
    ),
    Row(
        "is not a list of groups with params",
        load(lambda saved: saved.update(param_groups=[1])),
        "The file is damaged, or another program changed it.",
        "Load an older checkpoint.",
    ),
    Row(
        "is not its state: the checkpoint",
        load(lambda saved: saved.update(state={0: 1.0})),
        "The file is damaged, or another program changed it.",
        "Load an older checkpoint.",
    ),
    Row(
        "is a tensor of layout",
        load(changed("exp_avg", torch.zeros(3).to_sparse())),
        "The checkpoint is of an optimizer with sparse moments.",
        "Densify them, or start the optimizer afresh.",
    ),
    Row(
        "and the parameter <…>: the checkpoint is of another model",
        load(changed("exp_avg", torch.zeros(4))),
        "The model is another one, or its parameters come in another order.",
        "Build the optimizer as it was built for the checkpoint.",
    ),
    Row(
        "the checkpoint has no moments",
        load(without_moments),
        "The checkpoint is another optimizer's, such as SGD's.",
        "None, if that is meant: the moments start from zero, so warm the learning rate up again.",
    ),
    Row(
        "the checkpoint was made with",
        load(lambda saved: None, beta=50.0),
        "The constructor has another `beta` or `bias_correction` than the checkpoint, which wins.",
        "Set it in `optimizer.param_groups` after loading, or leave it out of the constructor.",
    ),
    Row(
        "the checkpoint's weight_decay=",
        load(lambda saved: saved["param_groups"][0].update(AS_IN_ADAMW), cls=Sadam),
        "A checkpoint of AdamW went into Sadam or SAMSGrad, or one of Adam into SadamW or SAMSGradW.",
        "Take the class with the same form, or tune `weight_decay` again.",
    ),
]
