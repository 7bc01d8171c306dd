"""Plugins: names of ours, modules of the user's, and names that lead nowhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from axolotl.config import Config, load_config
from axolotl.config.plugins import INTEGRATIONS, complaint, has_plugin, import_plugins, own_plugins
from axolotl.errors import ConfigError, EnvironmentProblem

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Loads a config with these plugins, beside two modules of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_plugin_of_tests.py").write_text("LOADED = True\nclass Plugin: pass\n")
    (tmp_path / "my_broken_plugin.py").write_text("1 / 0\n")

    def load(*names: str) -> Config:
        Path("c.yml").write_text(BASE + f"plugins: [{', '.join(names)}]\n")
        return load_config("c.yml")

    yield load
    for name in ("my_plugin_of_tests", "my_broken_plugin"):
        sys.modules.pop(name, None)


def test_names_of_old_files_are_features_of_ours(load) -> None:  # type: ignore[no-untyped-def]
    cfg = load(
        "axolotl.integrations.liger.LigerPlugin",
        "axolotl.integrations.kernels.KernelsPlugin",
        "cut_cross_entropy",
    )
    assert has_plugin(cfg, "liger")
    assert has_plugin(cfg, "cut_cross_entropy")
    assert not has_plugin(cfg, "kd")
    assert own_plugins(cfg) == []
    import_plugins(cfg)


@pytest.mark.parametrize("short", [name for name, feature in INTEGRATIONS.items() if feature])
def test_plugins_that_are_not_built_are_unavailable(load, short: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as caught:
        load(f"axolotl.integrations.{short}.SomePlugin")
    [problem] = caught.value.problems
    assert (problem.kind, str(problem.places[0])) == ("unavailable", "c.yml:4:11")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("axolotl.integrations.ligr.LigerPlugin", "`liger`"),
        ("no_such_package_anywhere.Plugin", "no_such_package_anywhere"),
        ("'not a module'", "package.module"),
    ],
)
def test_unknown_plugins_are_named(load, name: str, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as caught:
        load(name)
    [problem] = caught.value.problems
    assert problem.kind == "invalid_value"
    assert name.strip("'") in problem.message
    assert word in problem.message + problem.remedy


def test_plugins_of_the_user_are_imported_when_asked(load) -> None:  # type: ignore[no-untyped-def]
    cfg = load("my_plugin_of_tests.Plugin", "my_plugin_of_tests")
    assert "my_plugin_of_tests" not in sys.modules
    import_plugins(cfg)
    assert sys.modules["my_plugin_of_tests"].LOADED


def test_a_plugin_that_fails_is_told_with_its_place(load) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"my_plugin_of_tests\.Nothing"):
        import_plugins(load("my_plugin_of_tests.Nothing"))
    with pytest.raises(EnvironmentProblem, match="ZeroDivisionError") as caught:
        import_plugins(load("my_broken_plugin"))
    assert caught.value.problems[0].places[0].line == 4


def test_complaints_import_nothing(load) -> None:  # type: ignore[no-untyped-def]
    load()
    assert complaint("my_broken_plugin.Plugin") is None
    assert "my_broken_plugin" not in sys.modules


def test_plugins_are_found_in_the_working_folder(load, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    cfg = load("my_plugin_of_tests")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    import_plugins(cfg)
    assert sys.modules["my_plugin_of_tests"].LOADED


def test_what_a_plugin_lacks_is_named(load) -> None:  # type: ignore[no-untyped-def]
    Path("my_broken_plugin.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(ConfigError, match="it imports `no_such_module_anywhere`"):
        import_plugins(load("my_broken_plugin"))
