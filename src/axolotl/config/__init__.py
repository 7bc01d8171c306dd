"""The config language: `load_config` reads YAML files and overrides into a typed `Config`. Imports no torch."""

from __future__ import annotations

from axolotl.config.config import Config, Origin
from axolotl.config.load import load_config
from axolotl.config.resolve import Hardware, Resolution, resolve
from axolotl.config.unbuilt import unbuilt

__all__ = ["Config", "Hardware", "Origin", "Resolution", "load_config", "resolve", "unbuilt"]
