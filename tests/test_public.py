"""What the package promises to the outside: its names, what its pages say, and what is shipped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import axolotl
from axolotl import errors
from axolotl.cli.main import cli
from axolotl.config import load_config
from axolotl.config.data import DataSection
from axolotl.config.datasets import DatasetEntry
from axolotl.data.formats import resolve_format

PROJECT = Path(__file__).resolve().parent.parent
PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_public_name_is_there() -> None:
    assert set(axolotl.__all__) >= {
        "__version__",
        "load_config",
        "ConfigError",
        "UserError",
        "render_chat_template",
    }
    for name in axolotl.__all__:
        assert getattr(axolotl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = axolotl.nothing


def test_versions_agree() -> None:
    assert PYPROJECT["project"]["version"] == axolotl.__version__
    assert f"## {axolotl.__version__}" in (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_error_tree_has_one_root() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.AxolotlError) for kind in kinds)
    assert errors.UserError("x").exit_code == 2


@pytest.mark.parametrize("extra", ["flash-attn", "deepspeed"])
def test_extras_that_users_type_exist(extra: str) -> None:
    assert extra in PYPROJECT["project"]["optional-dependencies"]


def test_every_extra_that_the_source_names_exists() -> None:
    known = set(PYPROJECT["project"]["optional-dependencies"])
    named: dict[str, str] = {}
    for file in (PROJECT / "src").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call in re.findall(r"require_extra\(\s*\"[\w.]+\",\s*\"([\w-]+)\"", text):
            named[call] = file.name
        for call in re.findall(r"axolotl\[([\w,-]+)\]", text):
            named |= dict.fromkeys(call.split(","), file.name)
        for call in re.findall(r"\bextra=\"([\w-]+)\"", text):
            if call != "forbid":  # pydantic's
                named[call] = file.name
    assert {extra: file for extra, file in named.items() if extra not in known} == {}


def test_constraints_hold_every_dependency_and_no_path() -> None:
    text = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    for requirement in PYPROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        assert name
        assert name[0].lower().replace("_", "-") in pinned
    assert "/" not in text
    assert "+cpu" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto:")):
            assert (page.parent / target).exists(), target


def test_readme_names_every_verb() -> None:
    table = README.partition("## Commands")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `axolotl ([\w-]+)` \|", table, re.MULTILINE)) == set(cli.commands)


def test_readme_tree_names_every_folder() -> None:
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    named = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    folders = {
        p.name for p in (PROJECT / "src" / "axolotl").iterdir() if p.is_dir() and p.name != "__pycache__"
    }
    assert named == folders


def _documented_rows() -> list[tuple[str, str]]:
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```\n```json\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(("entry", "row"), _documented_rows())
def test_documented_rows_fit_their_entries(entry: str, row: str) -> None:
    values = json.loads(row)
    dataset = DatasetEntry.model_validate(yaml.safe_load(entry))
    assert resolve_format(dataset, list(values), DataSection()).convert(values)


def test_every_documented_row_is_tried() -> None:
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    assert text.count("```json") == len(_documented_rows()) >= 9


def test_documented_format_of_ones_own() -> None:
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block
    code = f"{block[1]}\nprint(shouted({{'text': 'quiet'}}).text)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "QUIET"


def test_readme_config_loads(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block
    config = tmp_path / "config.yml"
    config.write_text(block[1], encoding="utf-8")
    assert load_config(config).warnings == ()
    assert yaml.safe_load(block[1])["adapter"] == "lora"


def test_readme_figures_are_those_of_the_results() -> None:
    command = [sys.executable, "benchmarks/table.py", "--check"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_met_their_limits() -> None:
    for name in ("startup", "first_step", "overhead", "loss_equality"):
        result = json.loads((PROJECT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert all(result["limits_met"].values()), name


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = re.findall(
            r"`?\bmake ([a-z-]+)\b(?=`|\s{2,}|\s+#|$)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert set(named) <= targets, page.name


def test_nothing_names_this_machine() -> None:
    """Neither in the source nor in the pages: a clone works anywhere."""
    here = re.compile(r"/(?:work|root|home/\w+)/|/tmp/\w")
    for file in [
        *PAGES,
        *(PROJECT / "src").rglob("*.py"),
        *(PROJECT / "examples").rglob("*.yml"),
        PROJECT / "Makefile",
    ]:
        assert here.search(file.read_text(encoding="utf-8")) is None, file


@pytest.mark.slow
def test_wheel_brings_examples_and_deepspeed_configs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, PROJECT],
        check=True,
    )
    (wheel,) = tmp_path.glob("axolotl-*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import axolotl, axolotl.cli.fetch as f; assert 'site' in axolotl.__file__\n"
        "from pathlib import Path\n"
        "for what in f.FOLDERS: f.fetch(what, Path(what))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "examples" / "quickstart" / "base" / "model.safetensors").is_file()
    assert (tmp_path / "examples" / "llama-3" / "lora-1b.yml").is_file()
    assert (tmp_path / "deepspeed_configs" / "zero1.json").is_file()
