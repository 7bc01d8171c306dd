"""The model cards beside merged, consolidated and quantised weights: for people, for the Hub, and to know our own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from axolotl import __version__
from axolotl.model.files import could_be_hub_id, local_folder

CARD = "README.md"
_OURS = re.compile(r"^tags: \[axolotl, (merged|consolidated|quantized)\]$", re.MULTILINE)


def is_ours(folder: Path) -> bool:
    """Whether merging, consolidating or quantising wrote this folder, so that it can be made again."""
    try:
        return _OURS.search((folder / CARD).read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:
        return False


def base_named_in(folder: Path) -> str | None:
    """The repository that a folder's card names as its base."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^base_model: (\S+)$", text, re.MULTILINE)
    return found.group(1) if found else None


def model_card(base: str, adapter: Path, config: PeftConfig, dtype: str, checks: Sequence[Any]) -> str:
    """The card of merged weights: Markdown with the metadata that the Hub reads. Paths of this machine are left out."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    settings = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", getattr(config, "alpha", None)),
        "layers": _shown(getattr(config, "target_modules", None)),
        "trained in full": _shown(getattr(config, "modules_to_save", None)),
        "DoRA": getattr(config, "use_dora", None) or None,
        "rsLoRA": getattr(config, "use_rslora", None) or None,
    }
    name = _name_of(base)
    said = [
        f"Base model `{name}` with a trained {kind} adapter merged into its weights ({dtype}), "
        f"by axolotl {__version__}.",
        "",
    ]
    said += [f"- {key}: {value}" for key, value in settings.items() if value is not None]
    if checks:
        said += ["", "Compared with base and adapter after merging:", "", *(f"- {c}" for c in checks)]
    title = f"{Path(adapter).resolve().parent.name or 'model'}: {name}, fine-tuned"
    return _card("merged", base if _is_public(base) else None, title, said)


def consolidated_card(base: str, kind: str, tensors: int) -> str:
    """The card of weights that were put together from the parts of several processes. `kind`: "model" or "adapter"."""
    name = _name_of(base)
    what = f"An adapter for `{name}`" if kind == "adapter" else f"`{name}`, fine-tuned"
    said = [
        f"{what}: {tensors} tensors, put together from what each process had saved of its part, by axolotl "
        f"{__version__}."
    ]
    public = base if _is_public(base) else None
    return _card("consolidated", public, f"{name}, fine-tuned", said, "peft" if kind == "adapter" else "")


def quantized_card(base: str | None, scheme: str, table: Sequence[str]) -> str:
    """The card of quantised weights. `table`: sizes and losses before and after."""
    said = [f"Quantised to {scheme} by axolotl {__version__}.", "", "```", *table, "```"]
    return _card("quantized", base, f"{_name_of(base) if base else 'model'}, {scheme}", said)


def _card(tag: str, base: str | None, title: str, said: Sequence[str], library: str = "") -> str:
    lines = ["---", f"library_name: {library or 'transformers'}", "pipeline_tag: text-generation"]
    lines += [f"tags: [axolotl, {tag}]", *([f"base_model: {base}"] if base else []), "---", ""]
    return "\n".join([*lines, f"# {title}", "", *said]) + "\n"


def _is_public(base: str) -> bool:
    # A folder's name says nothing elsewhere, and the Hub refuses a card whose base is no repository.
    return local_folder(base) is None and could_be_hub_id(base)


def _name_of(base: str) -> str:
    return base if _is_public(base) else Path(base).name


def _shown(value: Any) -> str | None:
    if not value:
        return None
    return value if isinstance(value, str) else ", ".join(sorted(value))
