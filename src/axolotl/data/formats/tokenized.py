"""Rows that come with their tokens; they pass whatever the dataset's type says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.data.formats.columns import kind
from axolotl.data.formats.registry import Convert, Row, formats
from axolotl.data.types import IGNORE_INDEX, RowProblem, Tokenized

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

COLUMNS = ("input_ids", "labels")


def _numbers(row: Row, field: str) -> list[int]:
    value: Any = row.get(field)
    if not isinstance(value, list):
        raise RowProblem("not a list of token ids", f"`{field}` holds {kind(value)}")
    for each in value:
        if type(each) is not int:
            raise RowProblem("not a list of token ids", f"`{field}` holds {kind(each)} among its entries")
    return value


@formats.register("tokenized", "_synthetic", requires=["input_ids", "labels"], optional=["attention_mask"])
def tokenized(entry: DatasetEntry, data: DataSection) -> Convert:
    def convert(row: Row) -> Tokenized:
        ids, labels = _numbers(row, "input_ids"), _numbers(row, "labels")
        if len(ids) != len(labels):
            raise RowProblem("lengths differ", f"{len(ids)} `input_ids` and {len(labels)} `labels`")
        if ids and min(ids) < 0:
            raise RowProblem("not a token id", f"`input_ids` holds {min(ids)}")
        mask = row.get("attention_mask")
        if mask is not None:
            mask = _numbers(row, "attention_mask")
            if len(mask) != len(ids):
                raise RowProblem(
                    "lengths differ", f"{len(ids)} `input_ids` and {len(mask)} in `attention_mask`"
                )
            if 0 in mask:
                ids, labels = _unpadded(ids, labels, mask)
        return Tokenized(ids, labels)

    return convert


def _unpadded(ids: list[int], labels: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """The positions that are not padding."""
    if any(not m and label != IGNORE_INDEX for m, label in zip(mask, labels, strict=True)):
        raise RowProblem(
            "padding is trained", "a position with 0 in `attention_mask` has a label other than -100"
        )
    kept = [i for i, m in enumerate(mask) if m]
    return [ids[i] for i in kept], [labels[i] for i in kept]
