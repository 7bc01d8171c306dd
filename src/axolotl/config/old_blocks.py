"""Old spellings inside blocks: `fsdp`, `tokens` and the entries of datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.config.old_conversations import sharegpt_of_old
from axolotl.config.old_keys import FSDP_LEFTOVER, SPECIAL_TOKENS, is_off
from axolotl.config.yaml_file import Path, Spot, dotted
from axolotl.errors import Place

if TYPE_CHECKING:
    from axolotl.config.renames import Renaming


def tokens_of_old(renaming: Renaming) -> None:
    """`tokens:` was a mapping once, of what `special_tokens` names today."""
    tokens = renaming.values.get("tokens")
    if not isinstance(tokens, dict) or not tokens or not set(tokens) <= set(SPECIAL_TOKENS):
        return
    renaming.drop("tokens")
    special = renaming.values.get("special_tokens")
    if not isinstance(special, dict):
        renaming.values["special_tokens"] = special = {}
        renaming.spots[("special_tokens",)] = renaming.spots.get(("tokens",), _nowhere())
    for name, token in tokens.items():
        path, at = ("tokens", name), ("special_tokens", name)
        if special.get(name) not in (None, token):
            renaming.tell(
                "conflict",
                f"`{dotted(path)}` and `{dotted(at)}` name two tokens.",
                f"Delete `{dotted(path)}`.",
                path,
                at,
            )
        elif name not in special:
            special[name] = token
            renaming.typed[dotted(at)] = dotted(path)
            renaming.spots[at] = renaming.spots.get(path, _nowhere())
    renaming.warn(
        ("tokens",),
        "is a list of new tokens; these are called `special_tokens` today.",
        "Write `special_tokens:` instead.",
    )


def datasets_of_old(renaming: Renaming) -> None:
    """The entries of the lists of datasets."""
    for key in ("datasets", "test_datasets", "pretraining_dataset"):
        entries = renaming.values.get(key)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                _dataset(renaming, (key, index), entry)


def fsdp_of_old(renaming: Renaming) -> None:
    """The list `fsdp:` and the prefixes `fsdp_` inside `fsdp_config` belong to older versions."""
    config = renaming.values.get("fsdp_config")
    if isinstance(config, dict):
        _fsdp_prefixes(renaming, config)
    listed = renaming.values.pop("fsdp", None)
    if is_off(listed):
        return
    words = listed.split() if isinstance(listed, str) else listed
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        renaming.tell(
            "invalid_value",
            "`fsdp` is a list of words such as `[full_shard, auto_wrap]`.",
            "Write `fsdp_config:` instead.",
            ("fsdp",),
        )
        return
    known = {
        "full_shard": ("reshard_after_forward", True),
        "shard_grad_op": ("reshard_after_forward", False),
        "hybrid_shard": ("reshard_after_forward", True),
        "auto_wrap": ("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        "offload": ("offload_params", True),
    }
    unknown = [word for word in words if word not in known]
    if unknown:
        renaming.tell(
            "invalid_value",
            f"`fsdp` holds `{unknown[0]}`, which is not one of {', '.join(known)}.",
            "Write `fsdp_config:` instead.",
            ("fsdp",),
        )
        return
    if not isinstance(config, dict):
        renaming.values["fsdp_config"] = config = {}
        renaming.spots[("fsdp_config",)] = renaming.spots.get(("fsdp",), _nowhere())
    for word in words:
        key, value = known[word]
        config.setdefault(key, value)
    renaming.warn(
        ("fsdp",),
        "belongs to an older version; `fsdp_config` says it all.",
        "Write `fsdp_config:` alone, and `fsdp_version: 2` beside it.",
    )


def _fsdp_prefixes(renaming: Renaming, config: dict[Any, Any]) -> None:
    for old in list(config):
        new = {"version": "fsdp_version", "fsdp_version": "fsdp_version"}.get(str(old))
        new = new or str(old).removeprefix("fsdp_")
        if new == old:
            continue
        at, path = ("fsdp_config", new), ("fsdp_config", old)
        if new in config:
            renaming.tell(
                "conflict",
                f"`{dotted(path)}` and `{dotted(at)}` say the same thing twice.",
                f"Keep `{new}` alone.",
                path,
                at,
            )
            config.pop(old)
            continue
        config[new] = config.pop(old)
        renaming.typed[dotted(at)] = dotted(path)
        if path in renaming.spots:
            renaming.spots[at] = renaming.spots[path]
    if "cpu_offload" in config:
        config.setdefault("offload_params", config.pop("cpu_offload"))
    strategy = config.pop("sharding_strategy", None)
    if strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
        config.setdefault("reshard_after_forward", strategy == "FULL_SHARD")
    elif not is_off(strategy):
        renaming.warn(
            ("fsdp_config", "sharding_strategy"),
            f"is `{strategy}`, which has no effect: `reshard_after_forward` and `dp_replicate_size` say it today.",
            "Write these instead.",
        )
    for old in FSDP_LEFTOVER:
        if old in config and not is_off(config.pop(old)):
            renaming.warn(("fsdp_config", old), "has no effect on today's FSDP.", "Delete the line.")


# Types that name the function which older versions looked up; those of formats with several such functions are entered
# with the formats.
_TYPES = {
    "chat_template.default": "chat_template",
    "chat_template.load": "chat_template",
    "completion.load": "completion",
    "input_output.load": "input_output",
    "messages.chat.load": "messages.chat",
    "messages.load": "messages",
}


def _dataset(renaming: Renaming, at: Path, entry: dict[Any, Any]) -> None:
    """One entry of a list of datasets."""
    for old, target in (("message_field_role", "role"), ("message_field_content", "content")):
        if old in entry:
            name = entry.pop(old)
            if is_off(name):
                continue
            mappings = entry.setdefault("message_property_mappings", {})
            if not isinstance(mappings, dict):
                continue
            if mappings.get(target) not in (None, name):
                renaming.tell(
                    "conflict",
                    f"`{old}: {name}` and `message_property_mappings.{target}: "
                    f"{mappings[target]}` contradict each other.",
                    f"Delete `{old}`.",
                    (*at, old),
                    (*at, "message_property_mappings", target),
                )
            mappings.setdefault(target, name)
            renaming.spots.setdefault(
                (*at, "message_property_mappings"), renaming.spots.get((*at, old), _nowhere())
            )
    if "train_on_split" in entry:
        split = entry.pop("train_on_split")
        if not is_off(split):
            entry.setdefault("split", split)
            renaming.warn((*at, "train_on_split"), "is called `split` today.", "Write `split:` instead.")
    kind = entry.get("type")
    if isinstance(kind, str) and kind.partition(":")[0].partition(".")[0].partition("_")[0] == "sharegpt":
        sharegpt_of_old(renaming, at, entry, kind)
    elif isinstance(kind, str):
        entry["type"] = _TYPES.get(kind, kind)


def _nowhere() -> Spot:
    return Spot(Place(""), Place(""))
