"""`type: sharegpt` of older files, as the `chat_template` entry that reads the same rows in the same layout."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from axolotl.config.old_keys import is_off
from axolotl.config.yaml_file import Path

if TYPE_CHECKING:
    from axolotl.config.renames import Renaming

# What the rows are called: column of the messages, and in a message the keys of role and text.
_ROWS = {
    "": ("conversations", "from", "value"),
    "load": ("conversations", "from", "value"),
    "load_role": ("conversations", "role", "value"),
    "load_ultrachat": ("messages", "role", "content"),
}
_KIND = re.compile(r"sharegpt(_simple)?(\.(?P<loader>\w+))?(:\w+)?$")
# Layouts by the names of the package that laid them out, where a template of ours lays turns out so. That package's
# Alpaca and Metharme headers, and the system turns that it wrote of its own accord, are in none.
LAYOUTS = {
    "chatml": "chatml",
    "gemma": "gemma",
    "llama-3": "llama3",
    "llama3": "llama3",
    "mistral": "mistral_v1",
}
# Whose names a key listed, and the names that were known without it.
_NAMES = {"user": ("input", "field_human"), "assistant": ("output", "field_model")}
_KNOWN = {"user": ("human", "user"), "assistant": ("gpt", "assistant"), "system": ("system",)}
_BY_HAND = (
    "Write `type: chat_template`, `field_messages: conversations` and `message_property_mappings: "
    "{role: from, content: value}` instead"
)


def sharegpt_of_old(renaming: Renaming, at: Path, entry: dict[Any, Any], kind: str) -> None:
    """Rewrites one entry in place, with a warning, where it says how turns are laid out; otherwise asks for that."""
    found = _KIND.match(kind)
    rows = _ROWS.get(found["loader"] or "") if found else None
    if rows is None or at[0] == "pretraining_dataset":
        renaming.tell(
            "removed",
            f"`type: {kind}` is gone: `chat_template` reads such data.",
            f"{_BY_HAND}.",
            (*at, "type"),
        )
        del entry["type"]
        return
    layout = entry.pop("conversation", None)
    known = True
    entry["type"] = "chat_template"
    if entry.get("chat_template") or (is_off(layout) and renaming.values.get("chat_template")):
        pass
    elif isinstance(layout, str) and layout in LAYOUTS:
        entry["chat_template"] = LAYOUTS[layout]
        spot = renaming.spots.get((*at, "conversation"))
        if spot is not None:
            renaming.spots[(*at, "chat_template")] = spot
    elif is_off(layout):
        known = False
        renaming.tell(
            "missing",
            f"`type: {kind}` does not say how turns are laid out, and there is no `chat_template`.",
            "Add `chat_template: tokenizer_default` for the model's own layout, or `chat_template: chatml`. (Older "
            "versions took that of Vicuna.)",
            (*at, "type"),
        )
    else:
        known = False
        renaming.tell(
            "removed",
            f"`conversation: {layout}` is a layout that no template here has.",
            f"Delete the line and add `chat_template:` with one of {', '.join(dict.fromkeys(LAYOUTS.values()))}, "
            "`tokenizer_default`, or `jinja` with the layout in `chat_template_jinja`.",
            (*at, "conversation"),
        )
    messages, role, content = rows
    if is_off(entry.get("field_messages")):
        entry["field_messages"] = messages
    if is_off(entry.get("message_property_mappings")):
        entry["message_property_mappings"] = {"role": role, "content": content}
    if roles := _roles(entry):
        entry["roles"] = roles
    says = [f"field_messages: {entry['field_messages']}"]
    names = entry["message_property_mappings"]
    if isinstance(names, dict):
        pairs = ", ".join(f"{key}: {name}" for key, name in names.items())
        says.append(f"message_property_mappings: {{{pairs}}}")
    if roles:
        listed = ", ".join(f"{target}: [{', '.join(names)}]" for target, names in roles.items())
        says.append(f"roles: {{{listed}}}")
    if isinstance(entry.get("chat_template"), str):
        says.append(f"chat_template: {entry['chat_template']}")
    if known:
        renaming.warn(
            (*at, "type"),
            f"`{kind}` is read as `chat_template` with {', '.join(f'`{each}`' for each in says)}.",
            "Write it so. Older versions put a system turn of their own before conversations that have none; none is "
            "put there now.",
        )


def _roles(entry: dict[Any, Any]) -> dict[str, list[str]]:
    """`roles` of today for the names that the entry gave to those who ask and those who answer; empty where none did.

    Takes the keys that gave them out of the entry; other contents of `roles` stay, to be told as what they are.
    """
    old = entry.get("roles")
    old = old if isinstance(old, dict) and {"input", "output"} & old.keys() else {}
    given: dict[str, list[str]] = {}
    for role, (listed, single) in _NAMES.items():
        names = old.get(listed) or []
        names = [*(names if isinstance(names, list) else [names]), entry.pop(single, None)]
        given[role] = [str(name) for name in names if name is not None]
    if not any(given.values()):
        return {}
    taken = {name for names in given.values() for name in names}
    rest = {str(role): names for role, names in old.items() if role not in ("input", "output")}
    known = {role: [name for name in names if name not in taken] for role, names in _KNOWN.items()}
    return {role: [*given.get(role, []), *names] for role, names in known.items()} | rest
