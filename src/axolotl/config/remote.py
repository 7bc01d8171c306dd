"""A config's text from an https:// address or from a repository on the Hub."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from axolotl.config.fetch import from_disk, unreadable
from axolotl.config.secrets import masked
from axolotl.config.yaml_file import MAX_BYTES
from axolotl.registry import require_extra

TIMEOUT, DEADLINE = 20.0, 60.0
"""Seconds without a byte, and seconds for the whole file."""


class _SameSafety(urllib.request.HTTPRedirectHandler):
    """Follows an answer that points elsewhere, but never out of https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https://") and not newurl.startswith("https://"):
            raise ValueError("the server points to an address without https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def read_remote(address: str) -> bytes:
    """The bytes behind an address. Raises ConfigError when they cannot be had."""
    return _from_hub(address) if address.startswith("hf://") else _download(address)


def _download(url: str) -> bytes:
    local = url.startswith(("http://localhost", "http://127.0.0.1"))
    if url.startswith("http://") and not local:
        raise unreadable(url, "a config is fetched over https only", "Write https://.")
    opener = urllib.request.build_opener(_SameSafety())
    deadline = time.monotonic() + DEADLINE
    try:
        with opener.open(url, timeout=TIMEOUT) as answer:
            raw = b""
            while len(raw) <= MAX_BYTES and (piece := answer.read1(1 << 16)):
                raw += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it was not all here after {DEADLINE:.0f} seconds")
            return raw
    except urllib.error.HTTPError as error:
        raise unreadable(url, f"the server answers {error.code}", "Check the address.") from None
    except http.client.InvalidURL:
        raise unreadable(
            url, "it is no address", "Write https://host/file.yml, without name and password."
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise unreadable(url, masked(str(reason)), "Check the address and the network.") from None


def _from_hub(address: str) -> bytes:
    """hf://owner/repo/path/to/file.yml, optionally hf://owner/repo@revision/..."""
    parts = address.removeprefix("hf://").removeprefix("models/").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise unreadable(
            address, "an address on the Hub has the form hf://owner/repo/file.yml", "Write it so."
        )
    repo, _, revision = parts[1].partition("@")
    hub = require_extra("huggingface_hub", "hub", "Reading a config from the Hub")
    unreached = None if hub.constants.HF_HUB_OFFLINE else unreached_host(hub.constants.ENDPOINT)
    if unreached:
        raise unreadable(address, f"the Hub cannot be reached: {unreached}", "Check the network.")
    try:
        path = hub.hf_hub_download(f"{parts[0]}/{repo}", parts[2], revision=revision or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise unreadable(address, reason, "Check the address, the network and your Hub token.") from None
    return from_disk(Path(path), address)


def unreached_host(endpoint: str) -> str:
    """Why the host of an address cannot be found; empty where it can, or a proxy looks for it.

    Asked beforehand, because the Hub's library tries again and again for half a minute before it gives up.
    """
    if {"https", "http", "all"} & set(urllib.request.getproxies()):
        return ""
    host = urllib.parse.urlsplit(endpoint)
    try:
        socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError as error:
        return error.strerror or str(error)
    return ""
