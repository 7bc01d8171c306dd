"""The command line itself: what it prints, what it refuses, and what it leaves unimported."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from axolotl import __version__
from axolotl.cli.arguments import split_arguments
from axolotl.cli.main import cli
from axolotl.cli.overrides import parse_overrides
from axolotl.errors import DataError

Axolotl = Callable[..., subprocess.CompletedProcess[str]]
VERBS = {
    "train", "preprocess", "evaluate", "inference", "merge-lora", "fetch", "check", "config-schema", "explain",
}  # fmt: skip


def test_every_verb_is_there_and_says_what_it_does() -> None:
    assert set(cli.commands) >= VERBS
    for name, command in cli.commands.items():
        assert command.help, name
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0
        assert "--help" in result.output


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.output.strip() == f"axolotl, version {__version__}"


def test_help_is_quick() -> None:
    """The best of five, so that a busy machine does not fail it."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "axolotl", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) <= 0.3


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["--version"], ["fetch", "nothing"]])
def test_help_imports_no_heavy_library(args: list[str]) -> None:
    code = (
        "import sys\nfrom axolotl.cli.main import main\n"
        f"try: main({args!r})\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.rpartition("LOADED")[2].split())
    assert not loaded & {"torch", "transformers", "datasets", "pydantic", "numpy"}


@pytest.mark.parametrize(
    ("args", "sources", "overrides"),
    [
        (["a.yml"], ["a.yml"], []),
        (["a.yml", "b.yml", "--lora-r", "8"], ["a.yml", "b.yml"], ["--lora-r", "8"]),
        (["--learning-rate", "1e-4", "a.yml"], ["a.yml"], ["--learning-rate", "1e-4"]),
        (["--sample-packing", "a.yml"], ["a.yml"], ["--sample-packing"]),
        (["--no-sample-packing", "a.yml"], ["a.yml"], ["--no-sample-packing"]),
        (["--lora-r=8", "a.yml"], ["a.yml"], ["--lora-r=8"]),
        (["a.yml", "--trl.beta", "-0.1"], ["a.yml"], ["--trl.beta", "-0.1"]),
        (["a.yml", "--base-model-config", "c.yml"], ["a.yml"], ["--base-model-config", "c.yml"]),
        (
            ["a.yml", "--lora-target-modules", "[q_proj, v_proj]"],
            ["a.yml"],
            ["--lora-target-modules", "[q_proj, v_proj]"],
        ),
        (["https://host/a.yml", "--strict"], ["https://host/a.yml"], ["--strict"]),
    ],
)
def test_files_and_overrides_are_told_apart(
    args: list[str], sources: list[str], overrides: list[str]
) -> None:
    assert split_arguments(args) == (sources, overrides)


def test_a_flag_with_one_dash_is_told_once() -> None:
    sources, flags = split_arguments(["c.yml", "-lr", "1e-4", "--lora-r", "-1"])
    assert (sources, flags) == (["c.yml"], ["-lr", "1e-4", "--lora-r", "-1"])
    wrong, right = parse_overrides(flags)
    assert "two dashes" in wrong.fault
    assert "`--learning-rate`" in wrong.fault
    assert right[:2] == ("lora_r", "-1")


@pytest.mark.parametrize("verb", sorted(VERBS - {"fetch", "config-schema"}))
def test_a_missing_config_is_told(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb])
    assert result.exit_code == 2
    assert "config" in result.output


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["evaluate", "a.yml", "--launcher", "torchrun"], "`torchrun`: only `axolotl train`"),
        (["train", "a.yml", "--launcher", "mpi"], "'mpi' is not one of"),
        (["train", "a.yml", "--num-processes", "0"], "0 is not in the range"),
        (["train", "a.yml", "--", "--nnodes", "2"], "for another launcher"),
        (["train", "a.yml", "--launcher", "python", "--num-processes", "2"], "is one process"),
        (["train", "a.yml", "--launcher", "torchrun", "--num-processes", "2"], "-- --nproc-per-node 2"),
        (["train", "a.yml", "--launcher", "accelerate", "--num-processes", "2"], "-- --num_processes 2"),
        (["train", "a.yml", "--sweep", "s.yml", "--num-processes", "2"], "`--sweep` takes no"),
    ],
)
def test_options_that_fit_no_launcher_are_told(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert said in result.output


def _temporary_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> str:
    @click.command("fail")
    def fail() -> None:
        raise error

    monkeypatch.setitem(cli.commands, "fail", fail)
    return "fail"


def test_a_users_mistake_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(
        cli, [_temporary_verb(monkeypatch, DataError("row `7` is empty", "remove it"))]
    )
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli, [_temporary_verb(monkeypatch, ZeroDivisionError("bug"))])
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(cli, [_temporary_verb(monkeypatch, KeyboardInterrupt())]).exit_code == 130


@pytest.mark.parametrize("module", ["axolotl", "axolotl.cli.main"])
def test_runs_as_a_module(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in result.stdout


@pytest.mark.parametrize("verb", ["train", "preprocess", "evaluate", "inference", "merge_lora"])
def test_old_entry_points_are_the_verbs(verb: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"axolotl.cli.{verb}", "--help"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(f"Usage: axolotl {verb.replace('_', '-')}")


def test_a_wrong_config_is_told_before_torch(tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text("base_model: x\nlora_rnk: 8\nsequence_len: -5\n")
    code = (
        "import sys\nfrom axolotl.cli.main import main\n"
        f"try: main(['train', {str(config)!r}])\nexcept SystemExit as e: print('CODE', e.code)\n"
        "print('TORCH', 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CODE 2" in result.stdout
    assert "TORCH False" in result.stdout
    assert "`lora_rnk`" in result.stderr
    assert "config.yml:2" in result.stderr
    assert "config.yml:3" in result.stderr
    assert "Traceback" not in result.stderr
