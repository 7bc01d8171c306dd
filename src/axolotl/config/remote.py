"""A config's text from an https:// address or from a repository on the Hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from axolotl.config.fetch import from_disk, unreadable
from axolotl.config.yaml_file import MAX_BYTES
from axolotl.registry import require_extra

TIMEOUT = 20.0


def read_remote(address: str) -> bytes:
    """The bytes behind an address. Raises ConfigError when they cannot be had."""
    return _from_hub(address) if address.startswith("hf://") else _download(address)


def _download(url: str) -> bytes:
    local = url.startswith(("http://localhost", "http://127.0.0.1"))
    if url.startswith("http://") and not local:
        raise unreadable(url, "a config is fetched over https only", "Write https://.")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            raw: bytes = answer.read(MAX_BYTES + 1)
            return raw
    except urllib.error.HTTPError as error:
        raise unreadable(url, f"the server answers {error.code}", "Check the address.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise unreadable(url, str(reason), "Check the address and the network.") from None


def _from_hub(address: str) -> bytes:
    """hf://owner/repo/path/to/file.yml, optionally hf://owner/repo@revision/..."""
    parts = address.removeprefix("hf://").removeprefix("models/").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise unreadable(
            address, "an address on the Hub has the form hf://owner/repo/file.yml", "Write it so."
        )
    repo, _, revision = parts[1].partition("@")
    hub = require_extra("huggingface_hub", "hub", "Reading a config from the Hub")
    try:
        path = hub.hf_hub_download(f"{parts[0]}/{repo}", parts[2], revision=revision or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise unreadable(address, reason, "Check the address, the network and your Hub token.") from None
    return from_disk(Path(path), address)
