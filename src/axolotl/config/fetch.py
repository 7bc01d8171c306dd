"""Where a config's text comes from: a file, an https:// address, or a repository on the Hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from axolotl.config.yaml_file import MAX_BYTES, Document, decode, parse
from axolotl.errors import ConfigError, Place, Problem
from axolotl.registry import require_extra

TIMEOUT = 20.0


def _unreadable(name: str, why: str, remedy: str) -> ConfigError:
    return ConfigError(Problem(f"{name} cannot be read: {why}.", remedy, "path", (), (Place(name),)))


def read_source(source: str | Path) -> Document:
    """Reads and parses one config. Raises ConfigError when it cannot be read or is no YAML mapping."""
    name = str(source)
    if name.startswith(("https://", "http://")):
        raw = _download(name)
    elif name.startswith("hf://"):
        raw = _from_hub(name)
    else:
        raw = _from_disk(Path(name), name)
    return parse(decode(raw, name), name)


def _from_disk(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            raise _unreadable(name, "it is a folder", "Name the YAML file inside it.")
        if not path.exists():
            raise _unreadable(name, "there is no such file", _similar(path))
        if not path.is_file():
            raise _unreadable(name, "it is not an ordinary file", "Name a YAML file.")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable(name, reason.lower(), "Check the path and its permissions.") from None


def _similar(path: Path) -> str:
    near = [f for f in path.parent.glob("*.y*ml") if f.is_file()] if path.parent.is_dir() else []
    names = ", ".join(f"`{f}`" for f in sorted(near)[:5])
    return f"There are: {names}." if names else "Check the path."


def _download(url: str) -> bytes:
    local = url.startswith(("http://localhost", "http://127.0.0.1"))
    if url.startswith("http://") and not local:
        raise _unreadable(url, "a config is fetched over https only", "Write https://.")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            raw: bytes = answer.read(MAX_BYTES + 1)
            return raw
    except urllib.error.HTTPError as error:
        raise _unreadable(url, f"the server answers {error.code}", "Check the address.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _unreadable(url, str(reason), "Check the address and the network.") from None


def _from_hub(address: str) -> bytes:
    """hf://owner/repo/path/to/file.yml, optionally hf://owner/repo@revision/..."""
    parts = address.removeprefix("hf://").removeprefix("models/").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise _unreadable(
            address, "an address on the Hub has the form hf://owner/repo/file.yml", "Write it so."
        )
    repo, _, revision = parts[1].partition("@")
    hub = require_extra("huggingface_hub", "hub", "Reading a config from the Hub")
    try:
        path = hub.hf_hub_download(f"{parts[0]}/{repo}", parts[2], revision=revision or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _unreadable(address, reason, "Check the address, the network and your Hub token.") from None
    return _from_disk(Path(path), address)
