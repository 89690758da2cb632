"""param_groups: which parameters are decayed, whatever shape, wrapper or sharing the model has."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sadam_integrations import SadamW
from sadam_integrations.param_groups import param_groups


class LlamaRMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class FrozenBatchNorm2d(LlamaRMSNorm):
    pass


class Norms(nn.Module):
    """Not a normalisation layer, whatever its name sounds like."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.scale = LlamaRMSNorm(4)
        self.proj = nn.Linear(4, 4)


def names(model, named=None):
    """The names of the parameters that are decayed, and of those that are not."""
    of = {p: name for name, p in (named or model).named_parameters()}
    return {
        "no_decay" if "weight_decay" in group else "decay": [of[p] for p in group["params"]]
        for group in param_groups(model)
    }


def test_groups_hold_exactly_what_a_torch_optimizer_needs():
    groups = param_groups(Norms())
    assert [set(group) for group in groups] == [{"params"}, {"params", "weight_decay"}]
    assert groups[1]["weight_decay"] == 0.0
    for cls in (SadamW, torch.optim.AdamW):
        optimizer = cls(groups, lr=0.1, weight_decay=0.3)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_only_real_norm_layers_and_biases_are_not_decayed():
    assert names(Norms()) == {
        "decay": ["cls", "proj.weight"],
        "no_decay": ["norm.weight", "norm.bias", "scale.weight", "proj.bias"],
    }


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm((2, 3)),
        nn.GroupNorm(2, 4),
        nn.RMSNorm((2, 3)),
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        LlamaRMSNorm(4),
        FrozenBatchNorm2d(4),
        *(type(f"My{base.__name__}Layer", (base,), {})(4) for base in (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)),
        type("MyGroupNormLayer", (nn.GroupNorm,), {})(2, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norm_layers_of_any_shape_are_not_decayed(layer):
    assert set(names(nn.Sequential(layer))) == {"no_decay"}
    assert set(names(layer)) == {"no_decay"}  # the model itself may be the layer


def test_the_shape_does_not_decide():
    flat = nn.Linear(3, 4)
    flat.weight = nn.Parameter(flat.weight.detach().flatten())  # as FSDP shards it
    flat.bias = nn.Parameter(flat.bias.detach()[:, None])
    assert names(flat) == {"decay": ["weight"], "no_decay": ["bias"]}


def test_biases_inside_attention_and_recurrent_layers():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert set(names(attention)["no_decay"]) == {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}
    assert set(names(attention)["decay"]) == {"in_proj_weight", "out_proj.weight"}
    lstm = nn.LSTM(3, 4, num_layers=2)
    assert all(name.startswith("bias") for name in names(lstm)["no_decay"])
    assert all(name.startswith("weight") for name in names(lstm)["decay"])
    assert len(names(lstm)["no_decay"]) == 4


def test_bias_counts_only_in_the_last_part_of_a_name():
    model = nn.ModuleDict({"unbiased_head": nn.Linear(2, 2), "embedding": nn.Embedding(3, 2)})
    assert names(model) == {
        "decay": ["unbiased_head.weight", "embedding.weight"],
        "no_decay": ["unbiased_head.bias"],
    }


def test_tied_weights_appear_once():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3), nn.Linear(2, 3))
    model[1].weight = model[0].weight
    model[2].bias = model[1].bias
    assert names(model) == {"decay": ["0.weight", "2.weight"], "no_decay": ["1.bias"]}
    SadamW(param_groups(model))  # torch refuses a parameter that is in two groups


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Norms()
    model.proj.requires_grad_(False)
    model.cls.requires_grad_(False)
    assert names(model) == {"no_decay": ["norm.weight", "norm.bias", "scale.weight"]}
    assert names(nn.Linear(2, 2, bias=False)) == {"decay": ["weight"]}


def test_the_order_is_that_of_named_parameters():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
    order = [name for name, _ in model.named_parameters()]
    for group in names(model).values():
        assert group == sorted(group, key=order.index)
    assert sorted(names(model)["decay"] + names(model)["no_decay"]) == sorted(order)


def test_a_compiled_model_has_the_groups_of_the_model():
    model = Norms()
    assert names(torch.compile(model, backend="eager"), named=model) == names(model)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_models_have_the_groups_of_the_model(process_group):
    model = Norms()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert all(name.startswith("module.") for name, _ in wrapped.named_parameters())
    assert names(wrapped, named=model) == names(model)

    fsdp = nn.Module()  # the prefix of FSDP, in front of a whole model and of one layer
    model.norm = nn.Module()
    model.norm._fsdp_wrapped_module = nn.LayerNorm(4)
    fsdp._fsdp_wrapped_module = model
    assert names(fsdp, named=model)["no_decay"] == [
        "norm._fsdp_wrapped_module.weight",
        "norm._fsdp_wrapped_module.bias",
        "scale.weight",
        "proj.bias",
    ]


BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("BertForSequenceClassification", {"vocab_size": 11}),
        ("BertForMaskedLM", {"vocab_size": 11}),  # tied weights
        ("LlamaForCausalLM", {"vocab_size": 11}),  # a norm class of its own
        ("ViTForImageClassification", {"image_size": 8, "patch_size": 4}),
    ],
)
def test_transformers_models_have_the_groups_of_the_trainer(model, config):
    import transformers

    cls = getattr(transformers, model)
    model = cls(cls.config_class(**BERT, **config))
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    assert names(model) == {
        "decay": [name for name, _ in model.named_parameters() if name in decayed],
        "no_decay": [name for name, _ in model.named_parameters() if name not in decayed],
    }


def test_what_cannot_be_split_is_refused():
    with pytest.raises(TypeError, match=r"got generator.*give the model itself"):
        param_groups(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="nothing to train in ReLU: it has no parameters"):
        param_groups(nn.ReLU())
    with pytest.raises(ValueError, match=r"in Linear: all 2 parameters are frozen \(requires_grad=False\)"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))
