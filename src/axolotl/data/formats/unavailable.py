"""Types that configs carry and that are not built: named, so that the answer says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.data.formats.registry import Convert, formats
from axolotl.errors import ConfigError

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


def _absent(entry: DatasetEntry, data: DataSection) -> Convert:
    raise ConfigError(f"the dataset type `{entry.type}` is not available yet.")


formats.register(
    "creative_acr.load_critique",
    "creative_acr.load_revise",
    "reflection",
    unavailable="its long fixed prompt is not known here to the letter. A mapping under `type:` (field_instruction, "
    "field_output, format) writes any prompt.",
)(_absent)

formats.register(
    "stepwise_supervised",
    unavailable="its labels grade steps, for process reward models, which cannot be trained yet. `type: completion` "
    "trains on plain text.",
)(_absent)

formats.register("bradley_terry.chat_template", unavailable="it comes with reward models.")(_absent)
