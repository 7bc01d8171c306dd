"""Which rendered rows enter the data: length limits, rows in which nothing is trained, exact duplicates."""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from axolotl.data.ledger import LedgerRows, Outcome, Reason
from axolotl.data.types import IGNORE_INDEX, Rendered


@dataclass(frozen=True, slots=True)
class Limits:
    """The lengths that fit (both ends included), in tokens, and what is done with a row that is too long."""

    shortest: int
    longest: int
    too_long: Literal["drop", "truncate", "raise"] = "drop"


@dataclass(slots=True)
class FilteredRows:
    """Rows of one chunk as flat arrays: `ids` and `labels` hold the K rows of `lengths` end to end."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    lengths: np.ndarray  # int32, K
    trained: np.ndarray  # int32, K: tokens with a label
    owner: np.ndarray  # int32, K: position in the chunk of the input row that each came from
    keys: np.ndarray  # uint64, K: equal rows have equal keys
    ledger: LedgerRows  # one line per input row


def filter_rows(
    rendered: Sequence[Sequence[Rendered]], row_ids: Sequence[tuple[str, int]], limits: Limits
) -> tuple[FilteredRows, list[int]]:
    """Applies the limits to what each input row of a chunk was rendered to.

    Short rows go first, then long ones are dropped or cut, then rows without a trained token go: cutting may have
    taken the last of them. Returns the rows, and the positions of rows that are too long where that is an error.
    """
    n = len(rendered)
    ids_packed: list[bytes] = []
    labels_packed: list[bytes] = []
    lengths: list[int] = []
    owner: list[int] = []
    was_cut: list[bool] = []
    keys: list[int] = []
    tokens, pieces_before, reason = [0] * n, [0] * n, [Reason.NONE] * n
    overlong: list[int] = []
    shortest, longest = limits.shortest, limits.longest
    for i, pieces in enumerate(rendered):
        pieces_before[i] = len(pieces)
        if not pieces:
            reason[i] = Reason.UNTRAINED
        for piece in pieces:
            ids, labels = piece.input_ids, piece.labels
            length = len(ids)
            tokens[i] += length
            if length < shortest:
                # A row without an answer and without a prompt is told as what it is: empty of anything to train.
                reason[i] = Reason.SHORT if length else Reason.UNTRAINED
                continue
            cut = length > longest
            if cut:
                if limits.too_long == "truncate":
                    ids, labels, length = ids[:longest], labels[:longest], longest
                else:
                    reason[i] = Reason.LONG
                    if limits.too_long == "raise":
                        overlong.append(i)
                    continue
            # The quickest way from lists of Python integers to one array, by a factor of two to three.
            layout = f"{length}i"
            ids_packed.append(struct.pack(layout, *ids))
            labels_packed.append(struct.pack(layout, *labels))
            keys.append(row_key(ids_packed[-1], labels_packed[-1]))
            lengths.append(length)
            owner.append(i)
            was_cut.append(cut)
    ids_flat = np.frombuffer(b"".join(ids_packed), np.int32)
    labels_flat = np.frombuffer(b"".join(labels_packed), np.int32)
    lengths_k = np.array(lengths, np.int32)
    ends = np.cumsum(lengths_k, dtype=np.int64)
    trained_before = np.concatenate(([0], np.cumsum(labels_flat != IGNORE_INDEX, dtype=np.int64)))
    trained = (trained_before[ends] - trained_before[ends - lengths_k]).astype(np.int32)
    owner_k, cut_k = np.array(owner, np.int32), np.array(was_cut, bool)
    files = list(dict.fromkeys(file for file, _ in row_ids))
    place = {file: k for k, file in enumerate(files)}
    ledger = LedgerRows(
        files,
        np.fromiter((place[file] for file, _ in row_ids), np.int32, n),
        np.fromiter((row for _, row in row_ids), np.int64, n),
        np.zeros(n, np.int8),
        np.array(reason, np.int8),
        np.array(tokens, np.int64),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
        np.array(pieces_before, np.int32),
    )
    rows = FilteredRows(ids_flat, labels_flat, lengths_k, trained, owner_k, np.array(keys, np.uint64), ledger)
    truncated = np.zeros(n, bool)
    truncated[owner_k[cut_k]] = True
    untrained = np.where(cut_k, Reason.UNTRAINED_AFTER_CUT, Reason.UNTRAINED)
    return _close(_without(rows, trained == 0, untrained), truncated), overlong


def drop_rows(rows: FilteredRows, gone: np.ndarray, reason: Reason) -> FilteredRows:
    """The same rows without those that `gone` (bool, K) marks; the ledger says why."""
    if not gone.any():
        return rows
    truncated = rows.ledger.outcome == Outcome.TRUNCATED
    return _close(_without(rows, gone, np.full(len(gone), reason)), truncated)


def _without(rows: FilteredRows, gone: np.ndarray, reasons: np.ndarray) -> FilteredRows:
    if not gone.any():
        return rows
    stay = ~gone
    by_token = np.repeat(stay, rows.lengths)
    rows.ledger.reason[rows.owner[gone]] = reasons[gone]
    return FilteredRows(
        rows.ids[by_token],
        rows.labels[by_token],
        rows.lengths[stay],
        rows.trained[stay],
        rows.owner[stay],
        rows.keys[stay],
        rows.ledger,
    )


def _close(rows: FilteredRows, truncated: np.ndarray) -> FilteredRows:
    """Brings the ledger in line with the rows that are left."""
    n = len(rows.ledger.row)
    ledger = rows.ledger
    in_data = np.bincount(rows.owner, weights=rows.lengths, minlength=n).astype(np.int64)
    pieces = np.bincount(rows.owner, minlength=n).astype(np.int32)
    outcome = np.full(n, Outcome.KEPT, np.int8)
    outcome[ledger.pieces > 1] = Outcome.SPLIT
    outcome[truncated] = Outcome.TRUNCATED
    # A row of several pieces that lost one of them stays `split`; cut_tokens says how much was lost.
    outcome[(ledger.outcome == Outcome.SPLIT)] = Outcome.SPLIT
    outcome[pieces == 0] = Outcome.DROPPED
    reason = np.where((outcome == Outcome.KEPT), np.int8(Reason.NONE), ledger.reason)
    reason[(outcome == Outcome.TRUNCATED) & (reason == Reason.NONE)] = Reason.LONG
    rows.ledger = ledger._replace(
        outcome=outcome,
        reason=reason.astype(np.int8),
        trained=np.bincount(rows.owner, weights=rows.trained, minlength=n).astype(np.int64),
        cut=ledger.tokens - in_data,
        pieces=pieces,
    )
    return rows


def row_key(ids: bytes, labels: bytes) -> int:
    """A 64-bit hash of a row's tokens and labels."""
    digest = hashlib.blake2b(ids, digest_size=8)
    digest.update(labels)
    return int.from_bytes(digest.digest(), "little")


class SeenRows:
    """The keys of all rows kept so far, on disk: memory does not grow with the dataset."""

    def __init__(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        self._db = sqlite3.connect(file, isolation_level=None)
        # Nothing here outlives the run (it is rebuilt from the finished shards), so no durability is paid for.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY) WITHOUT ROWID")

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Enters keys (uint64, K); True (bool, K) for each that had been there, in this call or an earlier one."""
        repeated = np.zeros(len(keys), bool)
        self._db.execute("BEGIN")
        for i, key in enumerate(keys.view(np.int64).tolist()):
            repeated[i] = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 0
        self._db.execute("COMMIT")
        return repeated

    def close(self) -> None:
        self._db.close()
