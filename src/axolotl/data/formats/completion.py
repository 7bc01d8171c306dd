"""Plain text, trained as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.data.formats.columns import text
from axolotl.data.formats.registry import Format, Row, formats
from axolotl.data.types import Completion

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


@formats.register("completion", requires=["text"])
def completion(entry: DatasetEntry, data: DataSection) -> Format:
    field = entry.field or "text"

    def convert(row: Row) -> Completion:
        return Completion(text(row, field))

    return Format("completion", convert, (field,))
