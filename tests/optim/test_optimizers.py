"""Optimizers: every name is known without torch, each that is there learns, each that is not says why."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from axolotl.config.adapter import AdapterSection
from axolotl.config.optim import OptimSection
from axolotl.errors import ConfigError, EnvironmentProblem, ModelError
from axolotl.optim.adopt import Adopt
from axolotl.optim.build import build_optimizer, build_schedule, warmup_steps
from axolotl.optim.combined import Combined
from axolotl.optim.groups import parameter_groups
from axolotl.optim.lion import Lion
from axolotl.optim.options import options
from axolotl.optim.registry import optimizers

FACTS = {name: optimizers.describe(name).facts for name in optimizers.names()}
BUILT_IN = [name for name, facts in FACTS.items() if not {"extra", "unavailable"} & set(facts)]
REFERENCE = [
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "ademamix",
    "muon",
    "dion",
    "optimi_adamw",
    "ao_adamw_4bit",
    "ao_adamw_8bit",
    "ao_adamw_fp8",
    "adopt_adamw",
    "came_pytorch",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_radam",
    "galore_adamw",
    "lomo",
    "adalomo",
    "grokadamw",
    "apollo_adamw",
    "stable_adamw",
    "adamw_anyprecision",
    "sinkgd",
    "flash_adamw",
    "q_galore_adamw8bit",
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        return self.lm_head(self.norm(torch.tanh(self.hidden(self.embed_tokens(ids)))))


def section(**keys):
    return OptimSection.model_validate({"learning_rate": 0.02} | keys)


def build(net, adapter=None, **keys):
    return build_optimizer(net, section(**keys), AdapterSection.model_validate(adapter or {}))


def learn(net, optimizer, steps=40):
    ids = torch.arange(11)
    seen = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(ids), (ids + 3) % 11)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def test_every_name_of_old_configs_is_known():
    assert set(REFERENCE) <= set(optimizers.names())


def test_names_are_known_without_torch():
    code = "import sys; from axolotl.optim.registry import optimizers, schedules; optimizers.names(); schedules.names()"
    code += "; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_it_learns_and_goes_on_from_its_state(name):
    net = Net()
    optimizer = build(net, optimizer=name)
    seen = learn(net, optimizer)
    assert seen[-1] < seen[0] * 0.9
    twin = copy.deepcopy(net)
    other = build(twin, optimizer=name)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert learn(net, optimizer, 5) == learn(twin, other, 5)


@pytest.mark.parametrize("name", [n for n, facts in FACTS.items() if "unavailable" in facts])
def test_what_is_not_there_says_why(name):
    with pytest.raises(EnvironmentProblem, match="is not available"):
        build(Net(), optimizer=name)


@pytest.mark.parametrize("name", [n for n, facts in FACTS.items() if "extra" in facts])
def test_a_missing_package_names_its_extra(name, monkeypatch):
    monkeypatch.setattr("axolotl.registry.importlib.util.find_spec", lambda module: None)
    with pytest.raises(EnvironmentProblem) as error:
        build(Net(), optimizer=name)
    assert f"axolotl[{FACTS[name]['extra']}]" in error.value.problems[0].remedy


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ConfigError) as error:
        build(Net(), optimizer="adamw_tourch")
    assert "adamw_torch" in error.value.problems[0].remedy


def test_adam_options_arrive():
    optimizer = build(Net(), adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["fused"] is True


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=1,b=2.5", {"a": 1, "b": 2.5}),
        ("betas=(0.9, 0.95), foreach=True", {"betas": (0.9, 0.95), "foreach": True}),
        ("kind=plain", {"kind": "plain"}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
    ],
)
def test_optim_args(given, expected):
    assert options(section(optim_args=given)) == expected


def test_bad_optim_args_are_told():
    with pytest.raises(ConfigError, match="has not the form"):
        options(section(optim_args="a 1"))
    with pytest.raises(ConfigError, match="does not take these arguments"):
        build(Net(), optim_args={"nonsense": 1})


def names_of(net, groups):
    labels = {id(p): n for n, p in net.named_parameters()}
    return {g["name"]: sorted(labels[id(p)] for p in g["params"]) for g in groups}


def test_vectors_and_norms_do_not_decay():
    net = Net()
    groups = parameter_groups(net, section(weight_decay=0.1), AdapterSection())
    assert names_of(net, groups) == {
        "weights": ["embed_tokens.weight", "hidden.weight", "lm_head.weight"],
        "weights, no decay": ["hidden.bias", "norm.bias", "norm.weight"],
    }
    assert {g["name"]: g["weight_decay"] for g in groups} == {"weights": 0.1, "weights, no decay": 0.0}


def test_learning_rates_of_their_own():
    net = Net()
    groups = parameter_groups(
        net,
        section(embedding_lr_scale=0.5, lr_groups=[{"name": "deep", "modules": ["hidden"], "lr": 0.3}]),
        AdapterSection(),
    )
    assert {g["name"]: g.get("lr") for g in groups} == {
        "embeddings": 0.01,
        "deep": 0.3,
        "deep, no decay": 0.3,
        "weights, no decay": None,
    }
    with pytest.raises(ConfigError, match="`far`"):
        parameter_groups(
            net, section(lr_groups=[{"name": "far", "modules": ["nowhere"], "lr": 1.0}]), AdapterSection()
        )


def test_loraplus():
    net = nn.Module()
    for name in ("lora_A", "lora_B", "lora_embedding_A"):
        net.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
    groups = parameter_groups(net, section(), AdapterSection.model_validate({"loraplus_lr_ratio": 16}))
    assert {g["name"]: g.get("lr") for g in groups} == {
        "weights": None,
        "lora_B": pytest.approx(0.32),
        "lora embeddings": 1e-6,
    }


def test_frozen_parameters_stay_out():
    net = Net()
    net.embed_tokens.requires_grad_(False)
    found = names_of(net, parameter_groups(net, section(), AdapterSection()))
    assert "embed_tokens.weight" not in [n for names in found.values() for n in names]
    net.requires_grad_(False)
    with pytest.raises(ModelError, match="No parameter"):
        parameter_groups(net, section(), AdapterSection())


def test_a_group_named_as_one_of_ours_keeps_to_itself():
    groups = parameter_groups(
        Net(),
        section(lr_groups=[{"name": "weights", "modules": ["hidden"], "lr": 0.5}]),
        AdapterSection(),
    )
    rates = {
        name: g.get("lr")
        for g in groups
        for name, p in Net().named_parameters()
        for q in g["params"]
        if p.shape == q.shape and name.startswith(("hidden.weight", "embed"))
    }
    assert rates == {"hidden.weight": 0.5, "embed_tokens.weight": None}


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"), [(0, 0.5, 5), (0, None, 0), (3, None, 3), (None, 0.5, 5)]
)
def test_no_steps_of_warmup_beside_a_share_leave_it_to_the_share(steps, ratio, expected):
    assert warmup_steps(section(warmup_steps=steps, warmup_ratio=ratio), 10) == expected


@pytest.mark.parametrize("scheduler", ["polynomial", "cosine", "reduce_lr_on_plateau", "one_cycle"])
def test_a_combined_optimizer_takes_every_kind_of_schedule(scheduler):
    net = Net()
    cfg = section(optimizer="muon", lr_scheduler=scheduler)
    schedule = build_schedule(build(net, optimizer="muon"), cfg, 10)
    assert schedule.optimizer.defaults["lr"] == cfg.learning_rate


def test_muon_takes_the_matrices_of_the_layers_only():
    net = Net()
    optimizer = build(net, optimizer="muon")
    assert isinstance(optimizer, Combined)
    matrices, others = optimizer.parts
    assert [p is net.hidden.weight for g in matrices.param_groups for p in g["params"]] == [True]
    assert sum(len(g["params"]) for g in others.param_groups) == 5
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    schedule.step()
    assert all(g["lr"] == 0.01 for part in optimizer.parts for g in part.param_groups)


def test_lion_follows_its_formula():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    weight.grad = torch.tensor([0.3, -0.2])
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))
    assert torch.allclose(optimizer.state[weight]["momentum"], torch.tensor([0.003, -0.002]))
    # The blend now holds more of the old direction than of a small new gradient against it.
    weight.grad = torch.tensor([-0.001, 0.001])
    before = weight.detach().clone()
    optimizer.step()
    assert torch.allclose(weight, before * 0.95 + torch.tensor([-0.1, 0.1]))


def test_adopt_follows_its_formula():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = Adopt([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == 1.0
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    # mean = 0.1 * (1 / sqrt(2 ** 2)), and the square moves only afterwards.
    assert weight.item() == pytest.approx(1.0 - 0.1 * 0.1 * 0.5)
    assert optimizer.state[weight]["square"].item() == pytest.approx(0.99 * 4 + 0.01 * 1)
