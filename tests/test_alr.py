"""The adaptive learning rate: against exact sorts of real states, sampled, wrapped, damaged; the record of a run."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Embedding, Linear, Parameter, Sequential, Tanh

from sadam_integrations import PUBLISHED, Sadam, SadamW, SAMSGrad, advise, alr, chosen_betas, moments
from sadam_integrations.calibration import GAIN
from sadam_integrations.moments import gather

OPTIMIZERS = {
    "SadamW-auto": lambda params: SadamW(params, lr=1e-3),
    "SAMSGrad-auto": lambda params: SAMSGrad(params, lr=1e-3),
    "Sadam-published": lambda params: Sadam(params, **PUBLISHED),
    "Sadam-none": lambda params: Sadam(params, lr=1e-3, beta=200.0, bias_correction="none"),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "AdamW-eps-amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-4, amsgrad=True),
}


def net(seed=0):
    torch.manual_seed(seed)
    return Sequential(Linear(30, 40), Tanh(), Linear(40, 3))


def train(model, optimizer, steps=3, size=30):
    for t in range(steps):
        x = torch.randn(8, size, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def trained(make=OPTIMIZERS["SadamW-auto"], steps=3):
    model = net()
    optimizer = make(model.named_parameters())
    train(model, optimizer, steps)
    return model, optimizer


@pytest.fixture(scope="module")
def bert():
    """Trains a two-layer BERT for a few steps with the given optimizer."""
    transformers = pytest.importorskip("transformers")

    def run(make):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        optimizer = make(model.named_parameters())
        for _ in range(4):
            ids = torch.randint(0, 400, (8, 16))  # 600 words are never seen, and positions 16 to 63 neither
            model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return run


def exact(optimizer, p):
    """Root and A-LR of all live coordinates from the published formulas, in float64, and the smallest denominator."""
    group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
    state = optimizer.state[p]
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).detach().double().numpy().ravel()
    v = v[v > 0]
    form = group.get("bias_correction", "inner")
    root = np.sqrt(v / (1 - group["betas"][1] ** state["step"].item())) if form == "inner" else np.sqrt(v)
    if "eps" in group:
        return root, 1 / (root + group["eps"]), group["eps"]
    beta = state["beta"] if group["beta"] == "auto" else group["beta"]
    return root, beta / np.logaddexp(0, beta * root), math.log(2) / beta


def check_summary(found, root, rates, floor, size, rtol=1e-6):
    want = {"min": rates.min(), "max": rates.max(), "sqrt_v_min": root.min(), "sqrt_v_max": root.max()}
    for key, q in alr.QUANTILES.items():
        want[key], want[f"sqrt_v_{key}"] = np.quantile(rates, q), np.quantile(root, q)
    want["q99_over_q01"] = want["q99"] / want["q01"]
    want["floor_share"], want["unseen_share"] = np.mean(root < floor), 1 - len(root) / size
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=rtol, abs=1e-9), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bert_against_an_exact_sort(bert, name):
    model, optimizer = bert(OPTIMIZERS[name])
    samples = alr.sample(optimizer, model, limit=10**9)
    assert [s.name for s in samples] == [n for n, _ in model.named_parameters()]
    wholes = []
    for s, p in zip(samples, model.parameters(), strict=True):
        root, rates, floor = exact(optimizer, p)
        assert (s.size, s.unseen, len(s.root), s.weight) == (p.numel(), p.numel() - len(root), len(root), 1)
        check_summary(alr.summary([s]), root, rates, floor, s.size)
        wholes.append((root, rates, np.full(len(root), floor)))
    root, rates, floor = (np.concatenate(column) for column in zip(*wholes, strict=True))
    check_summary(alr.summary(samples), root, rates, floor, sum(p.numel() for p in model.parameters()))
    words = samples[0]
    assert words.name == "bert.embeddings.word_embeddings.weight" and words.unseen >= 600 * 48


@pytest.mark.parametrize("name", ["SadamW-auto", "AdamW"])
def test_a_sampled_bert(bert, name):
    """Exact ends and shares, quantiles within 3 % (1 % and 99 %: 6 %) from a twelfth of the word embeddings."""
    _, optimizer = bert(OPTIMIZERS[name])
    sampled, whole = alr.sample(optimizer, limit=6000), alr.sample(optimizer, limit=10**9)
    assert sum(len(s.root) for s in sampled) < 0.5 * sum(len(s.root) for s in whole)
    for one, all_ in ((sampled, whole), *(([a], [b]) for a, b in zip(sampled, whole, strict=True))):
        a, b = alr.summary(one), alr.summary(all_)
        for key in ("min", "max", "sqrt_v_min", "sqrt_v_max", "unseen_share"):
            assert a[key] == b[key]
    a, b = alr.summary(sampled), alr.summary(whole)
    for key in ("q25", "median", "q75", "sqrt_v_q25", "sqrt_v_median", "sqrt_v_q75"):
        assert a[key] == pytest.approx(b[key], rel=0.03), key
    for key in ("q01", "q99", "sqrt_v_q01", "sqrt_v_q99"):
        assert a[key] == pytest.approx(b[key], rel=0.06), key
    assert a["floor_share"] == pytest.approx(b["floor_share"], abs=0.01)


def test_the_sample_is_spread_by_size_and_always_the_same():
    p, q = Parameter(torch.zeros(1500, 1500)), Parameter(torch.zeros(50, 100))
    optimizer = torch.optim.Adam([p, q])
    second = torch.rand(1500, 1500, generator=torch.Generator().manual_seed(3)) + 0.1
    for param, v in ((p, second), (q, second[:50, :100].clone())):
        optimizer.state[param] = {"step": torch.tensor(5.0), "exp_avg": v, "exp_avg_sq": v}
    first, small = alr.sample(optimizer, limit=20_000)
    assert len(first.root) == round(20_000 * p.numel() / (p.numel() + q.numel())) and len(small.root) == 1000
    assert first.weight * len(first.root) == pytest.approx(p.numel())
    assert torch.equal(first.root, alr.sample(optimizer, limit=20_000)[0].root)
    want = (second.double() / (1 - 0.999**5)).sqrt()
    for key, q in alr.QUANTILES.items():  # of a uniform v: the quantiles' errors have a standard deviation under 0.4 %
        assert alr.summary([first])[f"sqrt_v_{key}"] == pytest.approx(np.quantile(want, q), rel=0.012)
    assert first.low == pytest.approx(want.min().item(), rel=1e-6)
    assert first.high == pytest.approx(want.max().item(), rel=1e-6)


def test_a_sample_does_not_follow_the_columns():
    """A plain stride would see few columns of a weight whose columns differ."""
    p = Parameter(torch.zeros(4096, 100))
    optimizer = torch.optim.Adam([p], eps=0.0)
    v = torch.arange(1.0, 101).square().expand(4096, 100).contiguous()
    optimizer.state[p] = {"step": torch.tensor(10.0**6), "exp_avg": v, "exp_avg_sq": v}
    found = alr.summary(alr.sample(optimizer, limit=4096))
    assert found["sqrt_v_median"] == pytest.approx(50.5, abs=3) and found["sqrt_v_q25"] == pytest.approx(25.5, abs=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_is_the_one_the_step_used(name):
    """(p_before - p_after) / (lr * gain * lr's correction * m) is the A-LR, coordinate by coordinate."""
    torch.manual_seed(0)
    p = Parameter(torch.randn(40, 20, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([p])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for scale in (1.0, 10.0, 0.01, 0.1):
        before, p.grad = p.detach().clone(), scale * torch.randn_like(p).pow(3)
        optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[p]
    c1, c2 = (1 - b**4 for b in group["betas"])
    form = group.get("bias_correction", "inner")
    for_lr = {"inner": 1 / c1, "outer": math.sqrt(c2) / c1, "none": 1.0}[form]
    gain = GAIN if group.get("beta") == "auto" else 1.0
    used = (before - p.detach()) / (group["lr"] * gain * for_lr * state["exp_avg"])
    (found,) = alr.sample(optimizer, limit=10**9)
    torch.testing.assert_close(found.alr, used.flatten().float(), rtol=1e-5, atol=0)
    assert found.alr_high == pytest.approx(used.max().item(), rel=1e-5)
    assert found.alr_low == pytest.approx(used.min().item(), rel=1e-5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.floats(2**-20, 2**20, width=32), st.integers(1, 30)), min_size=1, max_size=30))
def test_a_weight_is_as_many_equal_values(pairs):
    """Hypothesis: the weighted quantiles are numpy's of the list in which each value is repeated."""
    values = torch.tensor([value for value, _ in pairs])
    parts = [
        alr.Sample("w", weight, 0, value[None], value[None], 0.0, *[value.item()] * 4)
        for value, (_, weight) in zip(values, pairs, strict=True)
    ]
    found = alr.summary(parts)
    repeated = np.repeat(values.double().numpy(), [weight for _, weight in pairs])
    for key, q in alr.QUANTILES.items():
        assert found[key] == pytest.approx(np.quantile(repeated, q), rel=1e-9, abs=1e-12)
    assert (found["min"], found["max"]) == (repeated.min(), repeated.max())
    assert alr.summary(parts[::-1]) == pytest.approx(found)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(2**-20, 2**20, width=32), st.floats(0.3, 500)), min_size=1, max_size=40))
def test_quantiles_are_ordered_and_inside(pairs):
    values, weights = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = list(alr._quantiles(values, weights.double()).values())
    assert found == sorted(found)
    assert found[0] >= values.min() and found[-1] <= values.max()


def test_large_tensors_count_by_their_coordinates():
    big = alr.Sample("big", 9000, 0, torch.ones(10), torch.full((10,), 2.0), 3.0, 1.0, 1.0, 2.0, 2.0)
    small = alr.Sample("small", 1000, 0, torch.ones(90) * 5, torch.ones(90), 3.0, 5.0, 5.0, 1.0, 1.0)
    found = alr.summary([big, small])
    assert (found["q25"], found["median"], found["min"]) == (2.0, 2.0, 1.0)
    assert found["q01"] == 1.0 and found["floor_share"] == pytest.approx(0.9)
    shares = alr.histogram([big, small])
    assert sum(shares["after"][shares["edges"].index(0.3) :]) == pytest.approx(0.9)


def test_nothing_is_changed():
    """Neither the random numbers nor the state, and no tensor is kept alive."""
    model, optimizer = trained()
    state, numbers = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    samples = alr.sample(optimizer, model, limit=100)
    alr.metrics(optimizer, model, layers=True)
    assert torch.equal(torch.get_rng_state(), numbers)
    after = optimizer.state_dict()
    assert str(after) == str(state) and not any(s.root.requires_grad for s in samples)
    kept = [weakref.ref(optimizer.state[p]["exp_avg_sq"]) for p in model.parameters()]
    storages = {optimizer.state[p]["exp_avg_sq"].untyped_storage().data_ptr() for p in model.parameters()}
    assert not any(s.root.untyped_storage().data_ptr() in storages for s in samples)
    optimizer.zero_grad()
    del optimizer, after
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_before_the_first_step_there_is_nothing():
    for make in OPTIMIZERS.values():
        optimizer = make(net().parameters())
        assert alr.sample(optimizer) == [] and alr.metrics(optimizer, layers=True) == {}
    assert alr.summary([]) == {}
    assert alr.histogram([]) == {"edges": [], "before": [], "after": []}


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.RMSprop(p, lr=0.1),
    lambda p: torch.optim.Adamax(p, lr=0.1),
])  # fmt: skip
def test_an_optimizer_without_a_second_moment(make):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    with pytest.raises(TypeError, match=f"{type(optimizer).__name__} keeps no second moment"):
        alr.metrics(optimizer)


def test_names():
    _, optimizer = trained()
    assert [s.name for s in alr.sample(optimizer)] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    other = net()
    optimizer = SadamW([{"params": [other[0].weight]}, {"params": [other[0].bias, other[2].weight]}])
    train(other, optimizer)
    assert [s.name for s in alr.sample(optimizer)] == ["0.0", "1.0", "1.1"]
    compiled = torch.compile(other, backend="eager")
    assert [s.name for s in alr.sample(optimizer, compiled)] == ["0.weight", "0.bias", "2.weight"]


def test_unseen_rows_and_parameters():
    model = Sequential(Embedding(50, 8), Linear(8, 1))
    never = Parameter(torch.zeros(7))
    optimizer = SadamW([*model.parameters(), never], beta=50.0)
    model(torch.tensor([1, 2, 3])).square().sum().backward()
    never.grad = torch.zeros(7)
    optimizer.step()
    words, _, _, dead = alr.sample(optimizer)
    assert (words.size, words.unseen, len(words.root), words.weight) == (400, 376, 24, 1)
    assert (dead.unseen, len(dead.root), dead.weight) == (7, 0, 0) and math.isnan(dead.low)
    assert alr.summary([dead]) == {"unseen_share": 1.0}
    assert alr.summary([words, dead])["unseen_share"] == 383 / 407
    assert alr.summary([words, dead])["max"] == words.alr_high
    assert alr.histogram([dead])["edges"] == []


def test_a_few_live_coordinates_that_the_sample_misses():
    p = Parameter(torch.zeros(1000, 1000))
    optimizer = torch.optim.Adam([p])
    v = torch.zeros(1000, 1000)
    v[17, 3:6] = torch.tensor([4.0, 1.0, 9.0])
    optimizer.state[p] = {"step": torch.tensor(10.0**6), "exp_avg": v, "exp_avg_sq": v}
    (found,) = alr.sample(optimizer, limit=1000)
    assert (found.low, found.high, found.unseen) == (1, 3, 10**6 - 3)
    assert found.weight * len(found.root) == 3
    assert alr.summary([found])["sqrt_v_median"] == pytest.approx(2, abs=1)


def test_nan_and_infinity_are_left_out():
    model, optimizer = trained(OPTIMIZERS["AdamW"])
    weight, bias = list(model.parameters())[:2]
    clean = alr.sample(optimizer)[0]
    v = optimizer.state[weight]["exp_avg_sq"]
    v[0, 0], v[3, 5], v[4, 6] = math.nan, math.inf, 0.0
    optimizer.state[bias]["exp_avg_sq"].fill_(math.nan)
    found, broken, *_ = samples = alr.sample(optimizer)
    assert len(found.root) == len(clean.root) - 3 and found.unseen == 1
    assert (found.low, found.high) == (found.root.min(), found.root.max())  # all are drawn
    assert len(broken.root) == 0 and math.isnan(broken.high)
    assert all(math.isfinite(value) for value in alr.summary(samples).values())
    assert len(alr.histogram(samples)["after"]) > 1


def test_a_beta_that_is_not_measured_yet_is_left_out():
    model, optimizer = trained()
    optimizer.state[model[0].weight]["beta"] = 0.0
    assert [s.name for s in alr.sample(optimizer, model)] == ["0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("make", [OPTIMIZERS["SadamW-auto"], OPTIMIZERS["AdamW"]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes_and_shapes(make, dtype):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (), (0, 2), (4,))]
    optimizer = make(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    found = alr.sample(optimizer)
    parts = 2 if dtype.is_complex else 1
    assert [(s.name, s.size) for s in found] == [("0.0", 15 * parts), ("0.1", parts), ("0.3", 4 * parts)]
    assert all(s.root.dtype == s.alr.dtype == torch.float32 for s in found)
    v = optimizer.state[params[0]]["exp_avg_sq"]
    v = torch.view_as_real(v).flatten() if parts == 2 else v.flatten().to(torch.float64)
    torch.testing.assert_close(found[0].root, (v / (1 - 0.999**2)).sqrt().float(), rtol=1e-6, atol=0)
    assert alr.summary(found)["sqrt_v_max"] >= alr.summary(found)["sqrt_v_median"] > 0


def test_values_that_float32_cannot_hold():
    p = Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], eps=0.0)
    v = torch.tensor([1e-300, 1.0, 1e300], dtype=torch.float64)
    optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": v, "exp_avg_sq": v}
    assert all(math.isfinite(value) for value in alr.summary(alr.sample(optimizer)).values())


def test_steps_kept_elsewhere():
    """In the group (pytorch_optimizer, apex), uncorrected (apex), counted by nobody, or not begun."""
    model, optimizer = trained(OPTIMIZERS["AdamW"])
    want = [s.alr for s in alr.sample(optimizer)]
    for p in model.parameters():
        del optimizer.state[p]["step"]
    optimizer.param_groups[0]["step"] = 3
    for a, b in zip(want, alr.sample(optimizer), strict=True):
        assert torch.equal(a, b.alr)
    raw = optimizer.state[model[0].bias]["exp_avg_sq"].sqrt()
    optimizer.param_groups[0]["bias_correction"] = False
    assert torch.equal(alr.sample(optimizer, model)[1].root, raw)
    del optimizer.param_groups[0]["bias_correction"], optimizer.param_groups[0]["step"]
    assert torch.equal(alr.sample(optimizer, model)[1].root, raw)
    optimizer.param_groups[0]["step"] = 0
    assert alr.sample(optimizer) == []


@pytest.mark.parametrize("name", ["Yogi", "AdaBelief", "AdamP"])
def test_optimizers_of_pytorch_optimizer(name):
    library = pytest.importorskip("pytorch_optimizer")
    model = net()
    optimizer = getattr(library, name)(model.parameters(), lr=1e-3)
    train(model, optimizer)
    if name == "AdaBelief":
        with pytest.raises(TypeError, match="AdaBelief keeps no second moment"):
            alr.sample(optimizer)
    else:
        v = optimizer.state[model[0].bias]["exp_avg_sq"]
        root = alr.sample(optimizer, model)[1].root
        torch.testing.assert_close(root, (v[v > 0] / (1 - 0.999**3)).sqrt(), rtol=1e-5, atol=0)


def test_pieces_that_no_group_lists():
    """As under DeepSpeed ZeRO-3: the groups are empty, the state belongs to flat pieces."""
    _, optimizer = trained()
    want = alr.summary(alr.sample(optimizer))
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [], "weight_decay": 0.0})
    optimizer.param_groups[0]["params"] = []
    assert [s.name for s in alr.sample(optimizer)] == ["flat.0", "flat.1", "flat.2", "flat.3"]
    assert alr.summary(alr.sample(optimizer)) == want
    optimizer.param_groups[1]["betas"] = (0.9, 0.95)  # whose pieces are they?
    assert alr.sample(optimizer) == []


def wrappers():
    def accelerated(optimizer, model):
        accelerate = pytest.importorskip("accelerate")
        return accelerate.Accelerator(cpu=True).prepare(optimizer)

    def lightning(optimizer, model):
        return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)

    def fabric(optimizer, model):
        return pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1).setup(model, optimizer)[1]

    def deepspeed(optimizer, model):
        """accelerate's wrapper around DeepSpeed's, which is no torch Optimizer."""

        class ZeROOptimizer:
            def __init__(self, inner):
                self.optimizer, self.param_groups = inner, inner.param_groups

        class AcceleratedOptimizer(ZeROOptimizer):
            pass

        return AcceleratedOptimizer(ZeROOptimizer(optimizer))

    def named(*attributes):
        """Wrappers of other libraries, one in the other, each of which keeps it under a name of its own."""

        def wrap(optimizer, model):
            for attribute in attributes:
                outer = type("Wrapper", (torch.optim.Optimizer,), {"__init__": lambda self: None})()
                outer.param_groups = optimizer.param_groups
                setattr(outer, attribute, optimizer)
                optimizer = outer
            return optimizer

        return wrap

    known = {"accelerate": accelerated, "lightning": lightning, "fabric": fabric, "deepspeed": deepspeed}
    names = ("optim", "base_optimizer", "_base_optimizer", "opt", "_optimizer", "base", "wrapped", "inner_optimizer")
    return {**known, **{name: named(name) for name in names}, "all": named(*names)}


@pytest.mark.parametrize("kind", wrappers())
def test_wrapped(kind):
    model = net()
    optimizer = SadamW(model.parameters())
    wrapped = wrappers()[kind](optimizer, model)
    assert moments.unwrap(wrapped) is optimizer and moments.unwrap(optimizer) is optimizer
    train(model, optimizer)
    assert alr.metrics(wrapped, model, layers=True) == alr.metrics(optimizer, model, layers=True) != {}
    assert chosen_betas(wrapped, model) == chosen_betas(optimizer, model)
    assert str(advise(wrapped)) == str(advise(optimizer))
    assert gather(wrapped, 1) == [1]


def test_metrics():
    model, optimizer = trained()
    found = alr.metrics(optimizer, model, layers=True)
    whole = alr.summary(alr.sample(optimizer))
    assert {key: found[f"alr/{key}"] for key in whole} == whole
    layers = {key for key in found if not key.startswith("alr/")}
    names = [name for name, _ in model.named_parameters()]
    assert layers == {f"alr_layer/{n}/{k}" for n in names for k in ("median", "q99_over_q01", "floor_share")}
    assert alr.metrics(optimizer, model) == {f"alr/{key}": value for key, value in whole.items()}
    assert found["alr_layer/2.bias/median"] == alr.summary(alr.sample(optimizer)[3:])["median"]


def test_layer_groups(bert):
    model, _ = bert(OPTIMIZERS["AdamW"])
    names = [name for name, _ in model.named_parameters()]
    groups = alr.layer_groups(names[::-1])
    assert list(dict.fromkeys(groups[name] for name in names)) == ["embeddings", "layer 0", "layer 1", "head"]
    assert groups["bert.encoder.layer.1.output.dense.bias"] == "layer 1"
    assert groups["bert.pooler.dense.weight"] == groups["classifier.bias"] == "head"


@pytest.mark.parametrize(("names", "want"), [
    ("conv1.weight layer1.0.conv.weight layer2.1.conv.bias fc.bias", "conv1 layer1 layer2 fc"),
    ("net.conv1.weight net.fc.bias", "conv1 fc"),
    ("0.weight 2.weight 2.bias", "layer 0, layer 2, layer 2"),
    ("gpt.wte.weight gpt.h.0.w gpt.h.7.w lm_head.weight", "embeddings, layer 0, layer 7, head"),
    ("vit.embeddings.cls_token vit.layers.3.a.0.b vit.layernorm.bias", "embeddings, layer 3, head"),
    ("shared.w encoder.block.0.w decoder.block.0.w", "shared encoder decoder"),
    ("0.0 0.1 1.0", "0 0 1"),
    ("w", "w"),
    ("", ""),
])  # fmt: skip
def test_layer_groups_of_other_models(names, want):
    found = alr.layer_groups(names.split())
    assert list(found) == names.split()
    assert list(found.values()) == (want.split(", ") if "layer " in want else want.split())


def test_the_histogram():
    _, optimizer = trained(OPTIMIZERS["Sadam-published"])
    samples = alr.sample(optimizer)
    found = alr.histogram(samples)
    edges = np.array(found["edges"])
    root, rates = (torch.cat([getattr(s, key) for s in samples]).double().numpy() for key in ("root", "alr"))
    assert np.allclose(np.diff(edges), 0.1)
    for key, values in (("before", -np.log10(root)), ("after", np.log10(rates))):
        want = np.histogram(values, edges)[0] / len(values)
        assert sum(found[key]) == pytest.approx(1) and np.allclose(found[key], want, atol=1e-3)
    top = max(np.nonzero(found["after"])[0])
    assert edges[top] <= math.log10(50 / math.log(2)) <= edges[top + 1]  # nothing moves by more than beta / ln 2


def test_the_record(tmp_path):
    model, optimizer = trained()
    samples = alr.sample(optimizer, model)
    record = alr.Record(tmp_path / "run")
    assert alr.Record.read(tmp_path / "run") == [] and not (tmp_path / "run").exists()
    record.rewind(0)
    for step in (10, 20, 30):
        record.add(step, samples)
    lines = alr.Record.read(tmp_path / "run")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[0]["all"] == alr.summary(samples) and lines[0]["histogram"] == alr.histogram(samples)
    assert lines[0]["groups"] == {"layer 0": alr.summary(samples[:2]), "layer 2": alr.summary(samples[2:])}

    path = tmp_path / "run" / "alr.jsonl"
    path.write_text(path.read_text()[:-40])  # the process was killed while it wrote
    assert [line["step"] for line in alr.Record.read(tmp_path / "run")] == [10, 20]
    record.rewind(20)
    record.add(30, samples)
    assert alr.Record.read(tmp_path / "run") == lines
    alr.Record(tmp_path / "run").rewind(10)
    assert [line["step"] for line in alr.Record.read(tmp_path / "run")] == [10]
    assert [file.name for file in path.parent.iterdir()] == ["alr.jsonl"]

    path.write_text("{broken\n" + json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        alr.Record.read(tmp_path / "run")
