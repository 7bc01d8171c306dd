"""Flags as overrides: every way to write one, and what is wrong with one is told together with all the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.cli.overrides import Override, parse_overrides
from axolotl.config import Config, load_config
from axolotl.config.keys import kinds_at, owners
from axolotl.errors import ConfigError, Problem

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\nsample_packing: true\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(BASE)
    return tmp_path


def load(flags: str) -> Config:
    return load_config("c.yml", parse_overrides(flags.split()))


def told(flags: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(flags)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("flags", "key", "text"),
    [
        ("--learning-rate 1e-4", "learning_rate", "1e-4"),
        ("--learning-rate=1e-4", "learning_rate", "1e-4"),
        ("--learning_rate 1e-4", "learning_rate", "1e-4"),
        ("--sample-packing", "sample_packing", "true"),
        ("--sample-packing false", "sample_packing", "false"),
        ("--no-sample-packing", "sample_packing", "false"),
        ("--bf16 auto", "bf16", "auto"),
        ("--bf16", "bf16", "true"),
        ("--max-steps -1", "max_steps", "-1"),
        ("--lora-r null", "lora_r", "null"),
        ("--trl.beta 0.1", "trl.beta", "0.1"),
        ("--trl.use-vllm", "trl.use_vllm", "true"),
        ("--datasets[0].path b", "datasets[0].path", "b"),
        ("--datasets.0.path b", "datasets.0.path", "b"),
        ("--lora-target-modules [q_proj,v_proj]", "lora_target_modules", "[q_proj,v_proj]"),
        ("--wandb-name a=b", "wandb_name", "a=b"),
        ("--wandb-name=a=b", "wandb_name", "a=b"),
    ],
)
def test_one_flag(flags: str, key: str, text: str) -> None:
    [found] = parse_overrides(flags.split())
    assert (found.key, found.text, found.fault) == (key, text, "")
    assert found.flag == flags.split()[0].partition("=")[0]


def test_a_boolean_leaves_the_next_word_alone() -> None:
    found = parse_overrides(["--sample-packing", "--lora-r", "8", "--no-strict"])
    assert [(o.key, o.text) for o in found] == [
        ("sample_packing", "true"),
        ("lora_r", "8"),
        ("strict", "false"),
    ]


@pytest.mark.usefixtures("folder")
def test_overrides_reach_the_config() -> None:
    cfg = load(
        "--learning-rate 2e-5 --no-sample-packing --datasets[0].path b.jsonl --lora-target-modules [q,v] --lora-r 4"
    )
    assert (cfg.optim.learning_rate, cfg.data.sample_packing, cfg.data.datasets[0].path) == (
        2e-5,
        False,
        "b.jsonl",
    )
    assert (cfg.adapter.lora_target_modules, cfg.adapter.lora_r) == (["q", "v"], 4)
    assert str(cfg.place("lora_r")) == "--lora-r"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("flags", "kind", "flag", "remedy"),
    [
        ("--lora-rnk 8", "unknown_key", "--lora-rnk", "`--lora-r`"),
        ("--lora-rnk=8", "unknown_key", "--lora-rnk", "`--lora-r`"),
        ("--no-sample-pakcing", "unknown_key", "--no-sample-pakcing", "`--no-sample-packing`"),
        ("--datasets[0].pth x", "unknown_key", "--datasets[0].pth", "`--datasets[0].path`"),
        ("--learning-rate abc", "invalid_value", "--learning-rate", "number"),
        ("--sequence-len -5", "invalid_value", "--sequence-len", "2048"),
        ("--num-epochs", "syntax", "--num-epochs", "--key value"),
        ("--rl dpo", "unavailable", "--rl", ""),
        ("stray", "syntax", "stray", "--key value"),
        ("-lr 3", "syntax", "-lr", "--key value"),
    ],
)
def test_a_wrong_flag_is_told_as_it_was_typed(flags: str, kind: str, flag: str, remedy: str) -> None:
    problem = told(flags)[0]
    assert (problem.kind, str(problem.places[0])) == (kind, flag)
    assert f"`{flag}`" in problem.message
    assert remedy in problem.remedy


@pytest.mark.usefixtures("folder")
def test_flags_and_file_are_told_in_one_go() -> None:
    Path("c.yml").write_text(BASE + "lora_rank: 8\n")
    assert {str(p.places[0]) for p in told("--sequence-len -5 --adaptr lora")} == {
        "c.yml:5:1",
        "--sequence-len",
        "--adaptr",
    }


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("key", ["sequence_len", "lora_dropout", "val_set_size"])
def test_a_flag_is_answered_as_the_file_is(key: str) -> None:
    [from_flag] = told(f"--{key.replace('_', '-')} -3")
    Path("c.yml").write_text(BASE + f"{key}: -3\n")
    [from_file] = told("")
    assert (from_flag.kind, from_flag.keys, from_flag.remedy) == (
        from_file.kind,
        from_file.keys,
        from_file.remedy,
    )
    assert from_flag.message == from_file.message.replace(f"`{key}`", f"`--{key.replace('_', '-')}`")


@given(
    st.lists(
        st.text(max_size=12)
        | st.sampled_from(["--lora-r", "--bf16", "--no-", "--", "--=", "--a.b", "--datasets[0]", "8"])
    )
)
def test_any_words_are_read_without_an_error(words: list[str]) -> None:
    assert all(isinstance(each, Override) for each in parse_overrides(words))


def test_every_boolean_key_can_be_switched_by_name_alone() -> None:
    for key in owners():
        if bool in kinds_at((key,)):
            assert parse_overrides([f"--{key}", "--seed", "1"])[0] == Override(key, "true", f"--{key}")
            assert parse_overrides([f"--no-{key}"])[0].text == "false"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("flags", ["--no-adapter", "--adapter false", "--adapter null"])
def test_false_unsets_a_key_of_text_as_it_does_in_a_file(flags: str) -> None:
    Path("c.yml").write_text(BASE + "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n")
    assert load(flags).adapter.adapter is None


@pytest.mark.usefixtures("folder")
def test_what_a_flag_unset_is_told_by_its_key() -> None:
    Path("c.yml").write_text(BASE + "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n")
    [problem] = told("--no-lora-r")
    assert problem.message == "`adapter: lora` needs `lora_r`."
