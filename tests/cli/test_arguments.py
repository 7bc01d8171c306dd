"""What is told of flags that neither the verb nor the config knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from axolotl.cli.main import cli


@pytest.mark.parametrize(
    ("verb", "flag", "meant"),
    [
        ("inference", "--promt", "`--prompt`"),
        ("inference", "--max-new-token", "`--max-new-tokens`"),
        ("merge-lora", "--ouput", "`--output`"),
        ("train", "--launchr", "`--launcher`"),
        ("train", "--lora-rr", "`--lora-r`"),
    ],
)
def test_a_misspelt_option_of_the_verb_is_told_before_far_keys(
    tmp_path: Path, verb: str, flag: str, meant: str
) -> None:
    config = tmp_path / "c.yml"
    config.write_text("base_model: x/y\ndatasets: [{path: a, type: alpaca}]\nlearning_rate: 1e-4\n")
    result = CliRunner().invoke(cli, [verb, str(config), flag, "5"])
    assert result.exit_code == 2
    assert f"Did you mean {meant}?" in result.output
