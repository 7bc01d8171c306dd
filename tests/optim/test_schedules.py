"""Schedules: the course of the learning rate, step by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers.optimization import get_scheduler

from axolotl.config.optim import OptimSection
from axolotl.errors import ConfigError
from axolotl.optim.build import build_schedule, warmup_steps
from axolotl.optim.registry import schedules

TOTAL = 50


def section(**keys):
    return OptimSection.model_validate({"learning_rate": 1.0, "warmup_steps": 5} | keys)


def course(total=TOTAL, **keys):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, section(**keys), total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def theirs(name, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, 5, TOTAL, scheduler_specific_kwargs=arguments)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "cosine",
    ],
)
def test_the_same_course_as_in_transformers(name):
    assert course(lr_scheduler=name) == pytest.approx(theirs(name))


def test_arguments_of_a_schedule():
    ours = course(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.2})
    assert ours == pytest.approx(theirs("cosine_with_min_lr", min_lr_rate=0.2))
    with pytest.raises(ConfigError, match="does not take these arguments"):
        course(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs={"nonsense": 1})


@pytest.mark.parametrize(
    "name", [n for n in schedules.names() if n not in ("reduce_lr_on_plateau", "greedy")]
)
def test_every_schedule_runs_and_goes_on_from_its_state(name):
    keys = {"lr_scheduler": name}
    if "min_lr" in name:
        keys["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
    rates = course(**keys)
    assert max(rates) <= 1.0 + 1e-9
    assert min(rates) >= 0
    halves = []
    state = None
    for start, stop in ((0, 20), (20, TOTAL)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = build_schedule(optimizer, section(**keys), TOTAL)
        if state is not None:
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        for _ in range(start, stop):
            halves.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        state = (optimizer.state_dict(), schedule.state_dict())
    assert halves == rates


def test_plateau_waits_for_a_figure():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    keys = {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    schedule = build_schedule(optimizer, section(**keys), TOTAL)
    for figure in (1.0, 2.0, 3.0):
        schedule.step(figure)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_cosine_ends_at_its_minimum_and_stays_there():
    rates = course(cosine_min_lr_ratio=0.1, cosine_constant_lr_ratio=0.6)
    assert rates[5] == 1.0
    assert rates[30:] == [pytest.approx(0.1)] * 20
    assert rates[29] > 0.1
    plain = course(cosine_min_lr_ratio=0.25, total=500)
    assert plain[-1] == pytest.approx(0.25, abs=1e-4)
    assert plain[252] == pytest.approx((1 + 0.25) / 2, abs=0.01)


def test_quadratic_warmup():
    assert course(lr_quadratic_warmup=True)[:6] == pytest.approx([(k / 5) ** 2 for k in range(6)])


def test_rex_stays_high_and_drops_late():
    rates = course(lr_scheduler="rex", cosine_min_lr_ratio=0.1, total=505)
    assert rates[5] == 1.0
    assert rates[255] == pytest.approx(0.1 + 0.9 * 0.5 / 0.55)
    assert rates[-1] < 0.12
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))


def test_one_cycle_rises_and_falls():
    rates = course(lr_scheduler="one_cycle", warmup_steps=20, lr_div_factor=10)
    assert rates[0] == pytest.approx(0.1)
    assert rates[19] == 1.0 == max(rates)
    assert rates[-1] == pytest.approx(0.1 / 1e4)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        (optimizer := torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)),
        max_lr=1.0,
        total_steps=TOTAL,
        pct_start=20 / TOTAL,
        div_factor=10,
        cycle_momentum=False,
    )
    expected = []
    for _ in range(TOTAL):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "total", "expected"),
    [
        ({"warmup_steps": 10}, 100, 10),
        ({"warmup_steps": 10}, 4, 4),
        ({"warmup_steps": 0}, 100, 0),
        ({"warmup_steps": None, "warmup_ratio": 0.1}, 100, 10),
        ({"warmup_steps": None, "warmup_ratio": 0.1}, 101, 11),
        ({"warmup_steps": None, "warmup_ratio": 0.0}, 1000, 0),
        ({"warmup_steps": None}, 1000, 30),
        ({"warmup_steps": None}, 100_000, 100),
        ({"warmup_steps": None}, 10, 0),
    ],
)
def test_warmup(keys, total, expected):
    assert warmup_steps(section(**keys), total) == expected


def test_an_unknown_schedule_is_told():
    with pytest.raises(ConfigError, match="lr_scheduler"):
        course(lr_scheduler="cosinus")
    assert math.isclose(course()[5], 1.0)


COURSES = [n for n in schedules.names() if n not in ("reduce_lr_on_plateau", "greedy")]


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0), (1, 1), (2, 0), (2, 2), (3, 1), (10, 0), (10, 9), (10, 10), (10, 1)]
)
def test_every_schedule_at_its_edges(name, total, warmup):
    keys = {"lr_scheduler": name, "warmup_steps": warmup}
    if "min_lr" in name:
        keys["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
    rates = course(total, **keys)
    assert len(rates) == total and all(map(math.isfinite, rates))
    assert min(rates) >= 0 and max(rates) <= 1 + 1e-9
    if name == "one_cycle":
        # It begins at a 25th of the rate and has its peak at the end of the warmup.
        assert rates[0] == pytest.approx(1 / 25)
    elif name == "cosine_warmup_with_min_lr" or (name == "inverse_sqrt" and warmup == 0):
        assert rates[0] <= 1
    elif warmup and name != "constant":
        assert rates[0] == pytest.approx(0, abs=1e-9)
        if warmup < total:
            assert rates[warmup] == pytest.approx(1)
    else:
        assert rates[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "keys", "last"),
    [
        ("linear", {}, 1 / 45),
        ("cosine", {}, 0.5 * (1 + math.cos(math.pi * 44 / 45))),
        ("cosine", {"cosine_min_lr_ratio": 0.1}, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 44 / 45))),
        ("cosine", {"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.5}, 0.1),
        ("cosine", {"cosine_min_lr_ratio": 1.0}, 1.0),
        ("rex", {}, (1 / 45) / (0.1 + 0.9 / 45)),
        ("one_cycle", {}, 1 / 25 / 1e4),
        ("constant_with_warmup", {}, 1.0),
        ("constant", {}, 1.0),
    ],
)
def test_the_rate_of_the_last_step(name, keys, last):
    assert course(lr_scheduler=name, **keys)[-1] == pytest.approx(last)
