"""The dataset report: one self-contained HTML file that shows what a model will be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq

from axolotl.data.ledger import Counts, Reason
from axolotl.data.packing import pack
from axolotl.data.prepared import Prepared
from axolotl.data.preview import ShownRow, choose_rows, readable, shown_rows, visible
from axolotl.errors import EnvironmentProblem
from axolotl.report.figures import Bar, Histogram, bars, histogram

_TEMPLATE = Path(__file__).with_name("dataset.html.jinja")
_SAMPLE_ROWS = 12
_SAMPLE_TOKENS = 1500
_LOOKED_AT_ROWS = 20_000
_PACKED_ROWS = 200_000
_EXAMPLES = 5
_ROUND_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one kind in a sample row: `kind` is the CSS class."""

    kind: str
    text: str
    title: str


@dataclass(frozen=True)
class Drop:
    """Rows that ended in the ledger for one reason, with the first places."""

    dataset: str
    outcome: str
    reason: str
    count: int
    tokens: int
    places: list[str]


@dataclass(frozen=True)
class Fit:
    """What one sequence_len would do with this data."""

    sequence_len: int
    rows: float
    """Share of rows that fit whole."""
    tokens: float
    """Share of tokens in rows that fit whole."""
    packing: float
    """Share of packed rows that is not padding."""
    padding: float
    """The same where each row is padded to sequence_len."""


@dataclass(frozen=True)
class LedgerView:
    """What the report needs of the ledger, small however many rows there are."""

    drops: list[Drop]
    lengths: np.ndarray
    """Rendered tokens of each row of the train set that is about length: kept, truncated or too long (int64)."""
    lost: np.ndarray
    """bool: which of these were dropped as too long, or cut."""


def write_report(prepared: Prepared, tokenizer: Any, file: Path) -> Path:
    """Writes the report to `file` and returns it. Raises EnvironmentProblem where it cannot be written."""
    text = render_report(prepared, tokenizer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            f"the report cannot be written to `{file}`: {error.strerror}.", "Choose another `output_dir`."
        ) from error
    return file


def render_report(prepared: Prepared, tokenizer: Any) -> str:
    """The report as HTML."""
    index = prepared.row_index()
    ledger = read_ledger(prepared)
    sequence_len = prepared.data.sequence_len
    fits = [_fit(ledger.lengths, n, prepared.seed) for n in _candidates(ledger.lengths, sequence_len)]
    train = [s for s in prepared.summaries if s.set == "train"]
    total = sum((s.counts for s in train), Counts())
    _, repeats = np.unique(index["key"], return_counts=True)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["n"] = lambda value: f"{value:,}"
    environment.filters["share"] = lambda value: f"{value:.1%}"
    tokens = look_at_tokens(prepared, tokenizer)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        prepared=prepared,
        names=", ".join(dict.fromkeys(s.name for s in train)),
        options=_options(prepared),
        total=total,
        summaries=prepared.summaries,
        mixture=bars(
            [Bar(s.name, s.counts.tokens, s.counts.trained_tokens) for s in train if s.counts.tokens],
        ),
        train_rows=len(prepared.mixture.train),
        held_out=len(prepared.mixture.held_out),
        histogram=_length_histogram(ledger, sequence_len),
        spread=_spread(index["length"]),
        trained_spread=_spread(index["trained"]),
        fits=fits,
        now=_fit(index["length"], sequence_len, prepared.seed),
        sequence_len=sequence_len,
        suggestion=suggest_length(ledger.lengths),
        drops=ledger.drops,
        duplicates=int((repeats - 1).sum()),
        longest=_places(prepared, np.argsort(-index["length"], kind="stable")[:_EXAMPLES]),
        thinnest=_places(prepared, np.argsort(index["trained"] / index["length"], kind="stable")[:_EXAMPLES]),
        lopsided=_places(prepared, np.array([row for row, _, _ in tokens.lopsided], int)),
        lopsided_tokens=[(name, share) for _, name, share in tokens.lopsided],
        special=tokens.special,
        looked_at=tokens.rows,
        samples=[
            (row, list(_stretches(row)))
            for row in shown_rows(prepared, tokenizer, choose_rows(len(index["length"]), _SAMPLE_ROWS))
        ],
        sample_tokens=_SAMPLE_TOKENS,
    )


def read_ledger(prepared: Prepared) -> LedgerView:
    """Reads the ledger group by group."""
    names = {(s.set, s.dataset): s.name for s in prepared.summaries}
    found: dict[tuple[str, int, str, str], list[Any]] = {}
    lengths, lost = [], []
    for batch in pq.ParquetFile(prepared.ledger).iter_batches(1 << 16):
        table = {
            c: batch.column(c).to_numpy(zero_copy_only=False)
            for c in ("tokens", "dataset", "cut_tokens", "row")
        }
        words = {
            c: np.asarray(batch.column(c).to_pylist(), object) for c in ("set", "outcome", "reason", "file")
        }
        about = (words["set"] == "train") & np.isin(words["reason"], ["", *_ABOUT_LENGTH])
        lengths.append(table["tokens"][about])
        lost.append(words["reason"][about] != "")
        for i in np.flatnonzero(words["outcome"] != "kept").tolist():
            key = (words["set"][i], int(table["dataset"][i]), words["outcome"][i], words["reason"][i])
            entry = found.setdefault(key, [0, 0, []])
            entry[0] += 1
            entry[1] += int(table["cut_tokens"][i])
            if len(entry[2]) < _EXAMPLES:
                entry[2].append(f"{words['file'][i]}:{table['row'][i]}")
    drops = [
        Drop(names[set_name, dataset], outcome, reason, *entry)
        for (set_name, dataset, outcome, reason), entry in found.items()
    ]
    drops.sort(key=lambda d: -d.count)
    return LedgerView(drops, np.concatenate(lengths), np.concatenate(lost))


_ABOUT_LENGTH = (Reason.LONG.text, Reason.UNTRAINED_AFTER_CUT.text)


def suggest_length(lengths: np.ndarray) -> int:
    """The shortest sequence_len, in steps of 64, that leaves 99 % of the rows whole."""
    enough = int(np.quantile(lengths, 0.99, method="higher"))
    step = 64 if enough <= 2048 else 256
    return -(-enough // step) * step


def _candidates(lengths: np.ndarray, current: int) -> list[int]:
    longest = int(lengths.max())
    low = int(np.quantile(lengths, 0.25))
    chosen = [n for n in _ROUND_LENGTHS if low <= n < longest * 2]
    return sorted({*chosen, current, suggest_length(lengths)})


def _fit(lengths: np.ndarray, sequence_len: int, seed: int) -> Fit:
    fitting = lengths[(lengths <= sequence_len) & (lengths > 0)]
    if not len(fitting):
        return Fit(sequence_len, 0.0, 0.0, 0.0, 0.0)
    some = fitting[:: -(-len(fitting) // _PACKED_ROWS)]
    return Fit(
        sequence_len,
        len(fitting) / len(lengths),
        float(fitting.sum() / lengths.sum()),
        pack(some, sequence_len, seed=seed).efficiency,
        float(fitting.mean() / sequence_len),
    )


def _spread(values: np.ndarray) -> list[tuple[str, int]]:
    points = (("shortest", 0.0), ("median", 0.5), ("95 %", 0.95), ("99 %", 0.99), ("longest", 1.0))
    return [(name, int(np.quantile(values, q, method="nearest"))) for name, q in points]


def _length_histogram(ledger: LedgerView, sequence_len: int) -> Histogram:
    top = int(np.quantile(ledger.lengths, 0.995, method="higher"))
    top = max(top, min(sequence_len, 2 * top), 8)
    return histogram(ledger.lengths[~ledger.lost], ledger.lengths[ledger.lost], top, sequence_len)


@dataclass(frozen=True)
class TokenLook:
    """What a look at the tokens of some rows found."""

    rows: int
    special: list[tuple[str, int, int, int]]
    """(token, times, times trained, rows) of special and added tokens."""
    lopsided: list[tuple[int, str, float]]
    """(row, token, share) of rows of which one token makes up an unusual share."""


def look_at_tokens(prepared: Prepared, tokenizer: Any) -> TokenLook:
    """Counts special tokens, and finds rows in which one token occurs unusually often, in up to 20,000 spread rows."""
    dataset = prepared.saved("train").with_format("numpy")
    numbers = choose_rows(len(dataset), _LOOKED_AT_ROWS)
    added = tokenizer.added_tokens_decoder
    names = {i: t.content for i, t in added.items()}
    watched = np.array(sorted(names), np.int64)
    counts = np.zeros((3, len(watched)), np.int64)
    shares: list[tuple[float, int, int]] = []
    for start in range(0, len(numbers), 1000):
        block = numbers[start : start + 1000]
        rows = dataset[block]
        for number, ids, labels in zip(block, rows["input_ids"], rows["labels"], strict=True):
            values, times = np.unique(ids, return_counts=True)
            here = np.isin(watched, values)
            if here.any():
                counts[0][here] += times[np.searchsorted(values, watched[here])]
                trained = np.bincount(
                    np.searchsorted(watched, t := ids[(labels >= 0) & np.isin(ids, watched)])
                )
                counts[1][: len(trained)] += trained if len(t) else 0
                counts[2] += here
            if len(ids) >= 32:
                best = int(times.argmax())
                shares.append((float(times[best] / len(ids)), number, int(values[best])))
    special = [(names[int(w)], *map(int, counts[:, i])) for i, w in enumerate(watched) if counts[0, i]]
    special.sort(key=lambda s: -s[1])
    shares.sort(key=lambda s: -s[0])
    usual = float(np.median([s for s, _, _ in shares])) if shares else 0.0
    odd = [s for s in shares[:10] if s[0] > max(0.25, 3 * usual)]
    return TokenLook(
        len(numbers), special[:30], [(n, visible(repr(tokenizer.decode([t]))), share) for share, n, t in odd]
    )


def _places(prepared: Prepared, numbers: np.ndarray) -> list[tuple[str, int, int]]:
    """(file:row, tokens, trained) of prepared rows."""
    if not len(numbers):
        return []
    index = prepared.row_index()
    table = pq.read_table(prepared.ledger, columns=["file", "row"]).take(index["ledger"][numbers])
    return [
        (f"{file}:{row}", int(index["length"][n]), int(index["trained"][n]))
        for n, file, row in zip(numbers, table["file"].to_pylist(), table["row"].to_pylist(), strict=True)
    ]


def _stretches(row: ShownRow) -> Iterator[Stretch]:
    shown = readable(row.tokens[:_SAMPLE_TOKENS])
    for kind, group in groupby(shown, lambda pair: _kind(pair[0].trained, pair[0].special)):
        pairs = list(group)
        ids = " ".join(str(token.id) for token, _ in pairs[:40]) + (" …" if len(pairs) > 40 else "")
        yield Stretch(kind, visible("".join(text for _, text in pairs)), f"{kind}: {ids}")


def _kind(trained: bool, special: bool) -> str:
    return ("trained" if trained else "masked") + (" special" if special else "")


def _options(prepared: Prepared) -> Sequence[tuple[str, str]]:
    manifest = json.loads((prepared.root / "manifest.json").read_text(encoding="utf-8"))
    return [(k.strip("`"), v) for k, v in manifest["parts"].items() if k.startswith("`")]
