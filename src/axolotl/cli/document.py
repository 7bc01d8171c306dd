"""The config explained: one key, one file, the JSON Schema for editors, the docs page, and the report of `check`.

`python -m axolotl.cli.document` writes docs/config.md and examples/config.schema.json; with `--check` it only says
whether they are fresh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.cli.config_page import config_page
from axolotl.cli.config_schema import config_schema
from axolotl.config import Config
from axolotl.config.config import as_json
from axolotl.config.descriptions import default_text, meaning, old_keys, state, type_of
from axolotl.config.examples import example, in_yaml
from axolotl.config.keys import SYNONYMS, Nested, did_you_mean, nearest, nested, owner, owners
from axolotl.config.rules import RULES
from axolotl.config.section import default_of, facts
from axolotl.errors import ConfigError, Problem, UserError

__all__ = ["config_page", "config_schema", "explain_config", "explain_key", "report_check"]

PAGE = "docs/config.md"
SCHEMA = "examples/config.schema.json"


def explain_key(key: str) -> str:
    """Type, default, meaning, state, related keys and an example of one key (`lora_r`, `datasets.type`, `fsdp`).

    Raises ConfigError for a key that is not known.
    """
    key = key.removeprefix("--").replace("-", "_").replace("[]", "").strip()
    if key in owners():
        return _top_level(key)
    if key in old_keys():
        kind, text = old_keys()[key]
        words = {
            "alias": f"Another way to write {text}.",
            "renamed": f"An old name of {text}.",
            "removed": f"Gone. {text}",
            "leftover": f"Without effect: {text}.",
        }
        return f"{key}\n  {words[kind]}\n"
    homes = [n for n in nested() if key in (n.dotted.replace("[]", ""), n.key)]
    if homes:
        return "\n".join(_nested(home) for home in homes)
    known = [*owners(), *old_keys(), *(n.dotted.replace("[]", "") for n in nested())]
    near = (
        [SYNONYMS[key]] if key in SYNONYMS else nearest(key, known) or nearest(key, {n.key for n in nested()})
    )
    raise ConfigError(
        Problem(
            f"`{key}` is not a known key.",
            did_you_mean(near) or "docs/config.md lists them all.",
            "unknown_key",
            (key,),
        )
    )


def _top_level(key: str) -> str:
    section = owner(key)
    default = (
        "none: it has to be set"
        if facts(section, key).get("required")
        else default_text(default_of(section, key))
    )
    rows = [("meaning", meaning(section, key)), ("takes", type_of(section, key)), ("default", default)]
    how = state(section, key)
    if how != "available":
        told = {
            "validated": "is checked, but cannot run yet",
            "unavailable": "is not available yet",
            "idle": "so the key has no effect",
        }
        rows.append(
            ("state", f"{how}: {facts(section, key)['feature']}{', ' if how == 'idle' else ' '}{told[how]}")
        )
    rows.append(("section", section.title))
    old = [
        name
        for name, (kind, text) in old_keys().items()
        if kind in ("alias", "renamed") and f"`{key}" in text
    ]
    if old:
        rows.append(("also", ", ".join(old)))
    if related(key):
        rows.append(("see also", ", ".join(related(key))))
    shown = example(section, (key,))
    if shown:
        rows.append(("example", f"{key}: {shown}"))
    lines = [key, *(f"  {name:<9}{text}" for name, text in rows)]
    rules = [rule.doc for rule in RULES if key in rule.keys]
    if rules:
        lines += ["  rules", *(f"    - {doc}" for doc in rules)]
    inner = [n for n in nested() if n.parent in (key, f"{key}[]")]
    if inner:
        lines += ["  holds", *(f"    {n.key:<30}{meaning(n.block, n.key)}" for n in inner)]
    return "\n".join(lines) + "\n"


def _nested(home: Nested) -> str:
    key, block = home.key, home.block
    rows = [
        ("meaning", meaning(block, key)),
        ("takes", type_of(block, key)),
        (
            "default",
            default_text(default_of(block, key))
            if not block.model_fields[key].is_required()
            else "none: it has to be set",
        ),
        ("inside", home.parent),
    ]
    top = home.parent.split(".")[0].removesuffix("[]")
    holder, name = (block, key) if state(block, key) != "available" else (owner(top), top)
    if state(holder, name) == "unavailable":
        rows.append(("state", f"unavailable: {facts(holder, name)['feature']} is not available yet"))
    shown = example(block, (key,))
    if shown:
        rows.append(("example", f"{key}: {shown}"))
    return "\n".join([home.dotted, *(f"  {name:<9}{text}" for name, text in rows)]) + "\n"


def related(key: str) -> list[str]:
    """The keys that stand in a rule together with this one."""
    found = {other for rule in RULES if key in rule.keys for other in rule.keys}
    return sorted(found - {key})


def explain_config(cfg: Config) -> str:
    """Every effective value of a config and where it came from; what nobody set comes last, as defaults."""
    rows: list[tuple[str, str, str]] = []
    quiet: list[str] = []
    for key, value in cfg.effective().items():
        origin = cfg.origin(key)
        if origin.kind == "default":
            if value is not None and value != [] and state(owner(key), key) == "available":
                quiet.append(f"{key}: {in_yaml(value)}")
        else:
            text = in_yaml(value) if not isinstance(value, dict | list) else as_json(value)
            rows.append((key, text if len(text) <= 100 else text[:97] + "...", str(origin)))
    width = max((len(f"{key}: {text}") for key, text, _ in rows if len(text) < 50), default=0)
    lines = [f"{f'{key}: {text}':<{width}}  # {origin}" for key, text, origin in rows]
    return "\n".join([*lines, "", "# Defaults", *quiet]) + "\n"


def check_report(problems: Sequence[Problem]) -> dict[str, Any]:
    """What `axolotl check --json` prints: `ok`, and each problem with its place and remedy."""
    return {"ok": not any(p.fatal for p in problems), "problems": [p.as_dict() for p in problems]}


def report_check(find: Callable[[], Sequence[Problem]], *, as_json: bool, looked: str = "") -> int:
    """Runs a check and tells the result: on stdout as one JSON object, or on stderr for people. Returns the exit code."""
    try:
        problems = tuple(find())
    except UserError as error:
        problems = error.problems
    report = check_report(problems)
    if as_json:
        console.out(json.dumps(report, ensure_ascii=False))
    elif report["ok"]:
        for problem in problems:
            console.show_problem(problem)
        console.success(f"No mistake found. {looked}".strip())
    else:
        console.show_error(UserError(problems))
    return 0 if report["ok"] else UserError.exit_code


def main(args: Sequence[str]) -> int:
    """Writes the generated files below the current folder; `--check` compares them instead."""
    stale = []
    for name, text in ((PAGE, config_page()), (SCHEMA, json.dumps(config_schema(), indent=1) + "\n")):
        file = Path(name)
        if "--check" not in args:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
    for name in stale:
        console.warn(f"{name} is stale; run: python -m axolotl.cli.document")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
