"""axolotl: fine-tune language models from one flat YAML file.

Public names, imported when first used: `load_config`, `ConfigError` and the other errors, `render_chat_template`,
`register_format`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AxolotlError": "axolotl.errors",
    "CheckpointError": "axolotl.errors",
    "Config": "axolotl.config",
    "ConfigError": "axolotl.errors",
    "DataError": "axolotl.errors",
    "EnvironmentProblem": "axolotl.errors",
    "ModelError": "axolotl.errors",
    "Problem": "axolotl.errors",
    "UserError": "axolotl.errors",
    "load_config": "axolotl.plan.check",
    "register_format": "axolotl.data.formats",
    "render_chat_template": "axolotl.data.templates",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'axolotl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
