"""Codes of errors: each has its entry in docs/troubleshooting.md, each entry a code, and messages carry them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import get_args

import pytest

from axolotl.errors import CODES, Kind, Problem, UserError

SOURCE = Path(__file__).resolve().parent.parent / "src" / "axolotl"


def entries(project: Path) -> list[str]:
    text = (project / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### (AX\d{4})$", text, re.MULTILINE)


def test_every_code_has_an_entry_and_every_entry_a_code(project: Path) -> None:
    found = entries(project)
    assert sorted(found) == sorted(CODES)
    assert len(found) == len(set(found))


def test_codes_in_the_source_are_known(project: Path) -> None:
    used = set()
    for file in SOURCE.rglob("*.py"):
        used |= set(re.findall(r"\bAX\d{4}\b", file.read_text(encoding="utf-8")))
    assert used <= set(CODES) | {"AX1234"}


def test_every_code_is_used_somewhere() -> None:
    """A code that nothing can print would be an entry that nobody finds."""
    text = (
        "".join(f.read_text(encoding="utf-8") for f in SOURCE.rglob("*.py") if f.name != "errors.py")
        + (SOURCE / "errors.py").read_text(encoding="utf-8").split("_CODE_OF_KIND", 1)[1]
    )
    assert [code for code in CODES if code not in text] == []


@pytest.mark.parametrize("kind", [k for k in get_args(Kind) if k != "warning"])
def test_every_kind_of_error_has_a_code(kind: Kind) -> None:
    problem = Problem("`x` is wrong.", kind=kind)
    assert problem.shown_code in CODES
    assert problem.as_dict()["code"] == problem.shown_code


def test_a_code_of_its_own_goes_before_that_of_the_kind() -> None:
    error = UserError("It does not fit.", "Make it smaller.", code="AX1402")
    assert [p.shown_code for p in error.problems] == ["AX1402"]
    assert Problem("Take care.", kind="warning").as_dict()["code"] is None


def test_messages_and_json_carry_the_code(
    axolotl: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    file = tmp_path / "c.yml"
    file.write_text("base_model: x\nlora_rnk: 3\n", encoding="utf-8")
    told = axolotl("check", file)
    assert told.returncode == 2
    assert "`lora_rnk` is not a known key. [AX1002]" in told.stderr
    problems = json.loads(axolotl("check", file, "--json").stdout)["problems"]
    assert {"AX1002", "AX1005"} <= {p["code"] for p in problems}
