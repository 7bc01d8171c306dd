"""The dataset report: its figures, that it needs nothing but itself, and how a browser reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.data.prepare import prepare
from axolotl.data.prepared import Prepared
from axolotl.errors import EnvironmentProblem
from axolotl.report.dataset import look_at_tokens, read_ledger, suggest_length, write_report
from axolotl.report.figures import Bar, bars, histogram
from preparing import alpaca, llama3, section, write_rows


class Page(HTMLParser):
    """The page's elements; fails on tags that are not closed."""

    VOID = frozenset({"meta", "br", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID or (tag in ("rect", "line") and "/>" not in (self.get_starttag_text() or "")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("report")
    rows: list[dict[str, Any]] = [
        *alpaca(60),
        *alpaca(1),
        *alpaca(2, words=300),
        {"instruction": "Hi", "output": ""},
    ]
    rows.append({"instruction": "Show <b>bold</b> & <script>alert(1)</script>", "output": "</pre> done"})
    rows.append({"instruction": "Repeat", "output": "same " * 80})
    first = write_rows(folder / "first.jsonl", rows)
    second = write_rows(folder / "second.jsonl", alpaca(30, words=20))
    data = section(first, second, folder=folder / "p", val_set_size=0.1)
    return prepare(data, llama3())


@pytest.fixture(scope="module")
def report(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(prepared, llama3(), tmp_path_factory.mktemp("out") / "deep" / "report.html")


def test_it_is_one_file_without_references(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [a for _, attributes in page.elements for a in attributes if a in ("src", "href", "srcset")]
    assert not re.search(r"https?://|@import|url\(", report.read_text(encoding="utf-8"))


def test_it_tells_the_counts(report: Path, prepared: Prepared) -> None:
    text = Page(report.read_text(encoding="utf-8")).text()
    rows = len(prepared.saved())
    assert f"{rows} rows from 96" in text
    for part in (
        "3 rows dropped",
        "longer than sequence_len",
        "nothing in it is trained",
        "first.jsonl:62",
        "1 rows are exact repeats",
        f"{len(prepared.mixture.train)} rows are trained on, {len(prepared.mixture.held_out)} are held out",
        "second.jsonl",
        "<|end_of_text|>",
    ):
        assert part in text, part


def test_texts_of_the_data_stay_texts(report: Path, prepared: Prepared) -> None:
    page = report.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>bold" not in page


def test_samples_show_the_mask(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    kinds = {str(a.get("class")) for tag, a in page.elements if tag == "span"}
    assert {"trained", "masked", "masked special", "trained special"} <= kinds
    assert sum(a.get("class") == "sample" for tag, a in page.elements if tag == "details") == 12


@pytest.mark.browser
def test_a_browser_opens_it(report: Path, tmp_path: Path) -> None:
    """Needs Chromium (`apt-get install chromium`)."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser, "no Chromium is installed"
    shown = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--dump-dom",
            report.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    for part in ('id="lengths"', 'id="mixture"', 'id="fits"', 'id="drops"', 'id="outliers"', 'id="special"'):
        assert part in shown
    assert shown.count("<rect") >= 10
    assert shown.count('class="sample"') == 12
    assert "NaN" not in shown


def test_one_tiny_row_is_enough(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a b"}])
    data = section(folder=tmp_path / "p", datasets=[{"path": str(path), "type": "completion"}])
    text = Page(write_report(prepare(data, llama3()), llama3(), tmp_path / "r.html").read_text()).text()
    assert "Every row was kept as it is." in text
    assert "No row occurs twice." in text


def test_a_report_that_cannot_be_written(prepared: Prepared) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_report(prepared, llama3(), Path("/proc/nothing/report.html"))


def test_rows_that_repeat_one_token_are_found(prepared: Prepared) -> None:
    look = look_at_tokens(prepared, llama3())
    assert look.rows == len(prepared.saved())
    (row, token, share) = look.lopsided[0]
    assert (
        prepared.saved()[row]["input_ids"].count(llama3().encode(" same", add_special_tokens=False)[0]) >= 79
    )
    assert token == "' same'"
    assert share > 0.4
    counted = {name: (times, trained, rows) for name, times, trained, rows in look.special}
    everything = [t for ids in prepared.saved()["input_ids"] for t in ids]
    assert counted["<|end_of_text|>"] == (everything.count(4081),) * 3
    assert counted["<|begin_of_text|>"] == (everything.count(4080), 0, look.rows)


def test_lengths_hold_what_was_too_long(prepared: Prepared) -> None:
    view = read_ledger(prepared)
    assert view.lost.sum() == 2
    assert view.lengths[view.lost].min() > prepared.data.sequence_len
    assert len(view.lengths) == 95, "all but the row in which nothing is trained"


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=300))
def test_the_suggested_length_keeps_nearly_all_rows(lengths: list[int]) -> None:
    suggested = suggest_length(np.array(lengths))
    assert suggested % 64 == 0
    assert np.mean(np.array(lengths) <= suggested) >= 0.99
    assert suggested - 256 < max(lengths)


@given(
    st.lists(st.integers(0, 3000), max_size=50),
    st.lists(st.integers(0, 3000), max_size=50),
    st.integers(8, 2000),
)
def test_a_histogram_counts_every_row_inside_its_frame(kept: list[int], lost: list[int], top: int) -> None:
    shown = histogram(np.array(kept, int), np.array(lost, int), top, mark=100)
    assert sum(c.kept for c in shown.columns) == len(kept)
    assert sum(c.lost for c in shown.columns) == len(lost)
    for c in shown.columns:
        assert shown.left - 0.01 <= c.x <= c.x + c.width <= shown.right + 0.01
        assert shown.top - 0.01 <= c.lost_y <= c.kept_y <= shown.bottom + 0.01
    assert all(shown.left <= x <= shown.right + 0.01 for x, _ in shown.x_ticks)


def test_bars_have_the_length_of_their_share() -> None:
    first, second = bars([Bar("a", 300, 100), Bar("b", 100, 100)], width=300)
    assert (first.trained_width, first.masked_width) == (100, 200)
    assert (second.trained_width, second.masked_width) == (100, 0)
    assert first.share + second.share == 1
