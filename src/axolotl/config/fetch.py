"""Where a config's text comes from: a file, an https:// address, or a repository on the Hub."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from axolotl.config.secrets import masked
from axolotl.config.yaml_file import MAX_BYTES, Document, decode, parse
from axolotl.errors import ConfigError, Place, Problem


def unreadable(name: str, why: str, remedy: str) -> ConfigError:
    """The error for a source that cannot be read."""
    shown = masked(name)
    return ConfigError(Problem(f"{shown} cannot be read: {why}.", remedy, "path", (), (Place(shown),)))


def read_source(source: str | Path) -> Document:
    """Reads and parses one config. Raises ConfigError when it cannot be read or is no YAML mapping."""
    name = str(source)
    if name.startswith(("https://", "http://", "hf://")):
        # Imported only here: the network's modules would slow every other start.
        raw = importlib.import_module("axolotl.config.remote").read_remote(name)
    else:
        raw = from_disk(Path(name), name)
    return parse(decode(raw, name), name)


def from_disk(path: Path, name: str) -> bytes:
    """The bytes of a file, at most one more than a config may have. Raises ConfigError when it cannot be read."""
    try:
        if path.is_dir():
            raise unreadable(name, "it is a folder", "Name the YAML file inside it.")
        if not path.exists():
            raise unreadable(name, "there is no such file", _similar(path))
        if not path.is_file():
            raise unreadable(name, "it is not an ordinary file", "Name a YAML file.")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise unreadable(name, reason.lower(), "Check the path and its permissions.") from None


def _similar(path: Path) -> str:
    """What may be meant by a file that is not there: an override without dashes, or a file of a similar name."""
    key, equals, value = str(path).partition("=")
    if equals and key.isidentifier():
        return f"An override is a flag: `--{key.replace('_', '-')} {value}`."
    near = [str(f) for f in path.parent.glob("*.y*ml") if f.is_file()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), near, n=3)
    if close:
        return f"Did you mean {' or '.join(f'`{f}`' for f in close)}?"
    names = ", ".join(f"`{f}`" for f in sorted(near)[:5])
    return f"There are: {names}." if names else "Check the path."
