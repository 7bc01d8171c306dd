"""`unfrozen_parameters`: patterns, ranges of rows, and the mistakes one makes with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from axolotl.config.adapter import AdapterSection
from axolotl.config.optim import OptimSection
from axolotl.errors import ModelError
from axolotl.model.freeze import freeze_except, parse_unfrozen
from axolotl.optim.groups import parameter_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(32))
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def test_a_digit_class_is_a_pattern_and_not_a_range() -> None:
    trained = freeze_except(Net(), [r"^layers.2[0-9]+.weight$", "embed"])
    assert trained == ["embed.weight", *(f"layers.{i}.weight" for i in range(20, 30))]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("head.weight[7:]", range(7, 10)),
        ("head.weight[:2]", range(2)),
        ("head.weight[3:5]", range(3, 5)),
        ("head.weight", range(10)),
    ],
)
def test_only_the_named_rows_get_a_gradient(text: str, rows: range) -> None:
    net = Net()
    assert freeze_except(net, [text]) == ["head.weight"]
    net(torch.tensor([1, 2, 3])).square().sum().backward()
    moved = net.head.weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == list(rows)
    assert net.embed.weight.grad is None


def test_the_other_rows_stay_as_they_are_under_weight_decay() -> None:
    net = Net()
    freeze_except(net, ["head.weight[7:]"])
    before = net.head.weight.detach().clone()
    optim = OptimSection(learning_rate=0.1, weight_decay=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(net, optim, AdapterSection()), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.tensor([1, 2, 3])).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.head.weight[:7], before[:7])
    assert not bool((net.head.weight[7:] == before[7:]).any())


def test_several_ranges_of_one_parameter_add_up() -> None:
    net = Net()
    freeze_except(net, ["head.weight[:1]", "head.weight[9:]"])
    net(torch.tensor([1])).square().sum().backward()
    assert (net.head.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [0, 9]


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ModelError) as told:
        freeze_except(Net(), ["lm_head", "embed", "model.embed_tokens.weight$"])
    assert [p.message.split("`")[1] for p in told.value.problems] == [
        "unfrozen_parameters: lm_head",
        "unfrozen_parameters: model.embed_tokens.weight$",
    ]
    assert "`embed.weight`" in told.value.problems[0].remedy
    assert "`layers.0.weight`" in told.value.problems[0].remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head[5:5]", "empty range"),
        ("he(ad", "not a regular expression"),
        ("head.weight[10:]", "behind the last row"),
    ],
)
def test_wrong_entries(text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        freeze_except(Net(), [text])


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_ranges_are_read_as_written(start: int, count: int) -> None:
    entry = parse_unfrozen(f"lm_head.weight[{start}:{start + count}]")
    assert (entry.start, entry.end, entry.pattern.pattern) == (start, start + count, "lm_head.weight")
    assert not entry.whole
