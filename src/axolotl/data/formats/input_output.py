"""Text in segments, each with a word on whether it is trained; the user writes every control token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.data.formats.columns import decoded, kind
from axolotl.data.formats.registry import Convert, Row, formats
from axolotl.data.types import Piece, Pieces, RowProblem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


@formats.register("input_output", requires=["segments"])
def input_output(entry: DatasetEntry, data: DataSection) -> Convert:
    on_inputs = bool(data.train_on_inputs)

    def convert(row: Row) -> Pieces:
        segments = row.get("segments")
        if isinstance(segments, str):
            segments = decoded(segments, "`segments`")
        if not isinstance(segments, list) or not segments:
            raise RowProblem(
                "no segments", f"`segments` holds {kind(segments)}, a list of label and text is expected"
            )
        pieces = []
        for number, segment in enumerate(segments, 1):
            if not isinstance(segment, dict):
                raise RowProblem("segment is not an object", f"segment {number} is {kind(segment)}")
            label, part = segment.get("label"), segment.get("text")
            if not isinstance(part, str):
                raise RowProblem("segment without text", f"the `text` of segment {number} is {kind(part)}")
            if not isinstance(label, bool):
                raise RowProblem(
                    "segment without label",
                    f"the `label` of segment {number} is {kind(label)}, not a boolean",
                )
            pieces.append(Piece(part, label or on_inputs))
        return Pieces(pieces)

    return convert
