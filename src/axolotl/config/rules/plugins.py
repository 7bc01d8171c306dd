"""The rule about plugins."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.plugins import complaint
from axolotl.config.rules.rulebook import rule
from axolotl.errors import Problem


@rule("plugins")
def plugins_are_known(cfg: Config) -> Iterator[Problem]:
    """A plugin is a feature of ours, an installed entry point, or a module of the user's."""
    for index, name in enumerate(cfg.method.plugins or ()):
        found = complaint(name)
        if found:
            kind, message, remedy = found
            yield Problem(message, remedy, kind, (f"plugins[{index}]",))  # type: ignore[arg-type]
