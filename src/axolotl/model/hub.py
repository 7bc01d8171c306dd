"""Whether a model on the Hub can be had at all, asked before anything waits for it."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

import huggingface_hub

from axolotl.errors import Place, Problem
from axolotl.model.files import could_be_hub_id, local_folder


def check_hub(name: str, key: str = "base_model", place: Place | None = None) -> list[Problem]:
    """Whether a model on the Hub can be had: from the local cache, or over a network that is there.

    Without this question the Hub library asks again and again for half a minute before it gives up.
    """
    if local_folder(name) is not None or not could_be_hub_id(name):
        return []
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return []
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    proxied = any(
        os.environ.get(v) or os.environ.get(v.lower()) for v in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    )
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        if proxied:
            return []
        try:
            socket.getaddrinfo(endpoint.hostname, endpoint.port or 443)
            return []
        except OSError:
            pass
    return [
        Problem(
            f"`{key}: {name}` is not a folder here, not in the local cache, and the Hub cannot be reached.",
            "Check the path, or connect to the network (HF_HUB_OFFLINE forbids it where set).",
            "model",
            (key,),
            (place,) if place else (),
        )
    ]
