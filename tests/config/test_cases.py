"""Whole files as people have them, of all ages: each says in its first line how it is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl.config import Hardware, resolve, unbuilt
from axolotl.errors import ConfigError
from axolotl.plan.check import load_config

HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").glob("*.yml"))
EXAMPLES = sorted((HERE.parents[1] / "examples").rglob("*.yml"))


@pytest.mark.parametrize("file", CASES, ids=lambda f: f.stem)
def test_a_case_is_answered_as_it_says(file: Path) -> None:
    expected, *keys = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# expect: ").split()
    if expected == "accepted":
        cfg = load_config(file)
        resolved, _ = resolve(cfg, Hardware(cpus=2))
        assert resolved.resolved_yaml()
        return
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    fatal = [p for p in caught.value.problems if p.fatal]
    assert {p.kind for p in fatal} == {expected}
    assert set(keys) <= {p.keys[0] for p in fatal}
    assert all(p.places and p.places[0].line for p in fatal)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_our_examples_carry_no_mistake(file: Path) -> None:
    assert load_config(file).warnings == ()


def test_what_loads_but_cannot_run_yet(tmp_path: Path) -> None:
    file = tmp_path / "c.yml"
    base = "base_model: x\ndatasets: [{path: a, type: alpaca}]\nlearning_rate: 1\n"
    file.write_text(
        base
        + "deepspeed: {zero_optimization: {stage: 2}}\ndeepcompile: true\ndp_replicate_size: 1\nuse_ray: false\n"
    )
    problems = unbuilt(load_config(file))
    assert [(p.kind, p.keys[0], p.places[0].line) for p in problems] == [
        ("unavailable", "deepcompile", 5),
    ]
    file.write_text(base)
    assert unbuilt(load_config(file)) == []
