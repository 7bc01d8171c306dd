"""Overrides on the command line: any config key as a flag, its value as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from axolotl.config.keys import SYNONYMS, kinds_at, nearest, owners
from axolotl.config.yaml_file import scalar, undotted


class Override(NamedTuple):
    """One override: the key, its value as text, the flag as it was typed, and what is wrong with it (if anything)."""

    key: str
    text: str
    flag: str
    fault: str = ""


def key_of(flag: str) -> str:
    """`--datasets[0].path` and `--lora-r` as keys: dashes become underscores."""
    return flag.removeprefix("--").replace("-", "_")


def single_dash(word: str) -> bool:
    """`-lr`, but not `-1` nor `--lr`."""
    return word[:1] == "-" and word[1:2].isalpha()


def _boolean(key: str) -> bool:
    return bool(key) and bool in kinds_at(undotted(key))


def _known(key: str) -> bool:
    return bool(key) and bool(kinds_at(undotted(key)))


def parse_overrides(args: Sequence[str]) -> list[Override]:
    """Reads `--key value`, `--key=value`, a bare `--key` (true) and `--no-key` (false), nested keys with dots.

    Nothing is checked against the config here, and nothing raises: `load_config` tells what is wrong with an override,
    together with all other problems.
    """
    found: list[Override] = []
    index = 0
    while index < len(args):
        word = args[index]
        index += 1
        if not word.startswith("--") or word == "--":
            found.append(_stray(word))
            if (
                single_dash(word)
                and "=" not in word
                and index < len(args)
                and not args[index].startswith("-")
            ):
                index += 1  # its value
            continue
        flag, equals, text = word.partition("=")
        key = key_of(flag)
        if equals:
            found.append(Override(key, text, flag))
            continue
        if key.startswith("no_") and not _known(key):
            found.append(Override(key.removeprefix("no_"), "false", flag))
            continue
        following = args[index] if index < len(args) else None
        if following is not None and not following.startswith("--") and _takes(key, following):
            index += 1
            found.append(Override(key, following, flag))
        elif _boolean(key) or not _known(key):
            found.append(Override(key, "true", flag))
        else:
            found.append(Override(key, "", flag, f"`{flag}` needs a value."))
    return found


def _takes(key: str, following: str) -> bool:
    """Whether the next word is this flag's value: for a boolean, only if it can be one."""
    if not _boolean(key):
        return True
    kinds = kinds_at(undotted(key))
    return len(kinds) > 1 or isinstance(scalar(following), bool | int | None)


def _stray(word: str) -> Override:
    """A word that belongs to no flag."""
    bare = word.lstrip("-").partition("=")[0].replace("-", "_")
    near = SYNONYMS.get(bare) or next(iter(nearest(bare, owners())), "")
    if single_dash(word):
        given = near or bare
        return Override(
            bare,
            "",
            word,
            f"`{word}` is not a flag: flags have two dashes, as `--{given.replace('_', '-')}`.",
        )
    hint = f" Did you mean `--{near.replace('_', '-')}`?" if near else ""
    return Override(bare, "", word, f"`{word}` is not a flag.{hint}")
