"""Whether a model on the Hub can be had at all, asked before anything waits for it."""

from __future__ import annotations

import huggingface_hub

from axolotl.config.remote import unreached_host
from axolotl.errors import Place, Problem
from axolotl.model.files import could_be_hub_id, local_folder


def check_hub(name: str, key: str = "base_model", place: Place | None = None) -> list[Problem]:
    """Whether a model on the Hub can be had: from the local cache, or over a network that is there."""
    if local_folder(name) is not None or not could_be_hub_id(name):
        return []
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return []
    if not huggingface_hub.constants.HF_HUB_OFFLINE and _reachable():
        return []
    return [
        Problem(
            f"`{key}: {name}` is not a folder here, not in the local cache, and the Hub cannot be reached.",
            "Check the path, or connect to the network (HF_HUB_OFFLINE forbids it where set).",
            "model",
            (key,),
            (place,) if place else (),
        )
    ]


def check_upload(name: str | None, *, resuming: bool = False) -> list[Problem]:
    """Whether `hub_model_id: name` can be uploaded to, as far as that shows without asking the Hub.

    A network that is away is only a warning where a run goes on that has begun: its weights can be uploaded later.
    """
    if not name:
        return []
    message = remedy = ""
    if not could_be_hub_id(name):
        message, remedy = "has not the form of a repository's name", "Write owner/name."
    elif huggingface_hub.get_token() is None:
        message, remedy = "there is no token for the Hub", "Log in with `hf auth login`, or set HF_TOKEN."
    elif huggingface_hub.constants.HF_HUB_OFFLINE:
        message, remedy = "HF_HUB_OFFLINE forbids uploads", "Unset it."
    elif not _reachable():
        message, remedy = "the Hub cannot be reached", "Connect to the network."
        if resuming:
            return [Problem(f"`hub_model_id: {name}`: {message}.", remedy, "warning", ("hub_model_id",))]
    if not message:
        return []
    remedy += " Or delete the line and upload later: axolotl publish config.yml"
    return [Problem(f"`hub_model_id: {name}`: {message}.", remedy, "environment", ("hub_model_id",))]


def _reachable() -> bool:
    return not unreached_host(huggingface_hub.constants.ENDPOINT)
