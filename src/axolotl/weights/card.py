"""The model card that is saved beside merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from axolotl import __version__
from axolotl.model.files import could_be_hub_id, local_folder


def model_card(base: str, adapter: Path, config: PeftConfig, dtype: str, checks: Sequence[Any]) -> str:
    """Markdown with the metadata that the Hub reads. Paths of this machine are left out."""
    # A folder's name says nothing elsewhere, and the Hub refuses a card whose base is no repository.
    public = local_folder(base) is None and could_be_hub_id(base)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    settings = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", getattr(config, "alpha", None)),
        "layers": _shown(getattr(config, "target_modules", None)),
        "trained in full": _shown(getattr(config, "modules_to_save", None)),
        "DoRA": getattr(config, "use_dora", None) or None,
        "rsLoRA": getattr(config, "use_rslora", None) or None,
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [axolotl, merged]"]
    lines += [f"base_model: {base}"] if public else []
    name = base if public else Path(base).name
    lines += ["---", "", f"# {Path(adapter).resolve().parent.name or 'model'}: {name}, fine-tuned", ""]
    lines += [
        f"Base model `{name}` with a trained {kind} adapter merged into its weights ({dtype}), "
        f"by axolotl {__version__}.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in settings.items() if value is not None]
    if checks:
        lines += ["", "Compared with base and adapter after merging:", "", *(f"- {c}" for c in checks)]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str | None:
    if not value:
        return None
    return value if isinstance(value, str) else ", ".join(sorted(value))
