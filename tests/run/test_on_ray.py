"""What is asked of Ray, and what of its errors reaches the user; without Ray."""

from __future__ import annotations

import importlib.util
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl.config import Config
from axolotl.errors import ConfigError, EnvironmentProblem, ModelError
from axolotl.run import launch as starting
from axolotl.run.on_ray import WorkerFailed, _resources, _told


def asking(**keys: Any) -> Config:
    return Config().with_values({"use_ray": True, **keys}, {})


@pytest.mark.parametrize(
    "keys, there, wanted",
    [
        ({"ray_num_workers": 2}, {"CPU": 2.0}, (None, False)),
        ({"ray_num_workers": 2}, {"CPU": 2.0, "GPU": 2.0}, (None, True)),
        ({"ray_num_workers": 2, "resources_per_worker": {"GPU": 2}}, {"GPU": 4.0}, ({"GPU": 2.0}, True)),
        (
            {"ray_num_workers": 2, "resources_per_worker": {"CPU": 1}},
            {"GPU": 4.0, "CPU": 8.0},
            ({"CPU": 1.0}, False),
        ),
    ],
)
def test_what_each_worker_asks_for(keys: dict[str, Any], there: dict[str, float], wanted: Any) -> None:
    assert _resources(asking(**keys), there, may_grow=False) == wanted


def test_a_machine_that_has_too_little_is_told_and_a_cluster_may_grow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = asking(ray_num_workers=3, resources_per_worker={"GPU": 1})
    with pytest.raises(EnvironmentProblem, match="has 2 GPU in all"):
        _resources(cfg, {"GPU": 2.0}, may_grow=False)
    assert _resources(cfg, {"GPU": 2.0}, may_grow=True) == ({"GPU": 1.0}, True)
    assert "wait" in capsys.readouterr().err


def test_of_several_errors_the_one_that_says_something_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lost, mistake = RuntimeError("Connection closed by peer"), ModelError("It is no model.", "Take another.")
    with pytest.raises(ModelError, match="It is no model"):
        _told(SimpleNamespace(worker_failures={0: lost, 1: mistake}))
    assert "On rank 1:" in capsys.readouterr().err

    # Ray wraps what a worker raises, and sends it pickled.
    failed = pickle.loads(
        pickle.dumps(WorkerFailed(ArithmeticError("on purpose"), "ArithmeticError: on purpose"))
    )
    assert "purpose" not in str(failed)
    wrapped = SimpleNamespace(_base_exc=failed)
    assert _told(SimpleNamespace(worker_failures={0: lost, 3: wrapped})) == 1
    said = capsys.readouterr().err
    assert "On rank 3:" in said and said.count("ArithmeticError") == 1
    with pytest.raises(EnvironmentProblem, match="no space"):
        _told(SimpleNamespace(controller_failure=OSError("no space")))


@pytest.mark.parametrize("given", [{"launcher": "torchrun"}, {"processes": 2}])
def test_options_of_other_launchers_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Ray starts the workers"):
        starting.launch(asking(), [], **given)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"axolotl\[ray\]"):
        starting.launch(asking(), [])
