"""Reading JSON: one object in each line, or one document with a list of rows."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from axolotl.data.damage import Damage
from axolotl.data.json_keys import Decoder
from axolotl.data.readers import LinesReader, Row


class JsonLinesReader(LinesReader):
    """One JSON object in each line. Blank lines are skipped and counted."""

    counts_quickly = True

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        decoder = Decoder()
        decode, twice = decoder.decode, decoder.twice
        damage = Damage(self.label)
        blank = offset = 0
        number = 0
        for raw in self.lines():
            number += 1
            if raw.isspace() or not raw:
                blank += bool(raw)
                offset += len(raw)
                continue
            if start:
                start -= 1
                offset += len(raw)
                continue
            try:
                row = decode(raw.decode())
            except (ValueError, RecursionError) as error:
                damage.add_json(raw, number, offset, error)
                if damage.full:
                    break
            else:
                if type(row) is not dict:
                    damage.add_not_object(row, number)
                elif twice:
                    damage.add_duplicates(twice, number, raw.decode())
                elif (b"\\ud" in raw or b"\\uD" in raw) and not _encodable(row):
                    damage.add(
                        number, "half of a surrogate pair stands alone in a text (`\\ud8..`)", raw.decode()
                    )
                elif not damage:
                    yield number, row
            offset += len(raw)
        damage.raise_any()
        self.blank_lines = blank

    def _counted(self) -> int:
        return sum(1 for raw in self.lines() if raw and not raw.isspace())


def _encodable(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class JsonReader(LinesReader):
    """A .json file: a list of objects, an object that holds such a list, one object, or JSON lines after all."""

    CHUNK = 1 << 20

    def __init__(self, path: Path, label: str | None = None, field: str | None = None) -> None:
        super().__init__(path, label)
        self.fields = [f for f in (field, "data") if f]

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        layout = self._layout
        if layout == "lines":
            inner = JsonLinesReader(self.path, self.label)
            yield from inner.rows(start)
            self.blank_lines = inner.blank_lines
        else:
            rows = self._listed() if layout == "list" else self._from_object()
            yield from itertools.islice(rows, start, None)

    @property
    def counts_quickly(self) -> bool:  # type: ignore[override]
        return self._layout == "lines"

    def _counted(self) -> int:
        return JsonLinesReader(self.path, self.label).count() if self.counts_quickly else super()._counted()

    @cached_property
    def _layout(self) -> str:
        """What the file holds, as its first bytes tell: `lines`, a `list` or one `object`."""
        text = _Text(self, Damage(self.label))
        first = text.skip(0)
        if text.buffer.startswith("[", first):
            return "list"
        end = text.buffer.find("\n", first)
        while end < 0 and text.grow():
            end = text.buffer.find("\n", first)
        line = text.buffer[first : end if end >= 0 else None].strip()
        try:
            json.loads(line)
        except ValueError:
            # An object that is printed over several lines opens in the first and does not close there.
            return "lines" if line.endswith("}") or not line.startswith("{") else "object"
        return "object" if end < 0 or text.skip(end) == len(text.buffer) else "lines"

    def _from_object(self) -> Iterator[tuple[int, Row]]:
        damage = Damage(self.label)
        text = _Text(self, damage)
        while text.grow():
            pass
        content, whole = text.buffer, None
        decoder = Decoder()
        try:
            whole = decoder.decode(content)
        except json.JSONDecodeError as error:
            begun = content.rfind("\n", 0, error.pos) + 1
            what = (
                "the file is cut off"
                if error.pos >= len(content.rstrip())
                else f"not valid JSON: {error.msg}"
            )
            damage.add(error.lineno, what, content[begun:].split("\n", 1)[0], column=error.colno)
        except RecursionError as error:
            damage.add(1, f"not readable: {error}", "")
        if decoder.twice:
            damage.add_duplicates(decoder.twice, 1, content)
        damage.raise_any()
        if not isinstance(whole, dict):
            damage.add_not_object(whole, 1)
            damage.raise_any()
            return
        rows = next((whole[f] for f in self.fields if isinstance(whole.get(f), list)), [whole])
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                damage.add_not_object(row, None, number)
            elif not damage:
                yield number, row
            if damage.full:
                break
        damage.raise_any()

    def _listed(self) -> Iterator[tuple[int, Row]]:
        """The elements of a top-level list, of which only one chunk is in memory at a time."""
        damage = Damage(self.label)
        text, number = _Text(self, damage), 0
        decoder = Decoder()
        at = text.skip(0) + 1  # behind the opening bracket
        while True:
            at = text.skip(text.forget(at))
            if number == 0 and text.buffer.startswith("]", at):
                break
            try:
                row, end = decoder.raw_decode(text.buffer, at)
            except json.JSONDecodeError as error:
                # The value may merely go on behind what was read so far.
                open_end = error.pos > len(text.buffer) - 64 or error.msg.startswith(
                    ("Unterminated", "Invalid \\")
                )
                if open_end and text.grow():
                    continue
                self._broken(text, error, open_end, damage)
                break
            except RecursionError as error:
                damage.add(text.line(at), f"not readable: {error}", "")
                break
            number += 1
            if type(row) is not dict:
                damage.add_not_object(row, text.line(at), number)
            elif decoder.twice:
                damage.add_duplicates(decoder.twice, text.line(at), text.buffer[at:end])
            elif not damage:
                yield number, row
            if damage.full:
                break
            at = text.skip(end)
            if text.buffer.startswith("]", at):
                break
            if not text.buffer.startswith(",", at):
                missing = (
                    "the file is cut off" if at >= len(text.buffer) else "a comma or `]` is expected here"
                )
                damage.add(text.line(at), missing, "")
                break
            at += 1
        damage.raise_any()

    def _broken(self, text: _Text, error: json.JSONDecodeError, open_end: bool, damage: Damage) -> None:
        begun = text.buffer.rfind("\n", 0, error.pos) + 1
        if open_end and not text.buffer.rstrip().endswith("]"):
            damage.add(
                text.line(error.pos), "the file is cut off", "", "The file is incomplete: get it again."
            )
        else:
            shown = text.buffer[begun : error.pos + 60].split("\n")[0]
            damage.add(
                text.line(error.pos), f"not valid JSON: {error.msg}", shown, column=error.pos - begun + 1
            )


class _Text:
    """The text of a file, as far as it was asked for and not forgotten again."""

    def __init__(self, reader: JsonReader, damage: Damage) -> None:
        self.chunks, self.damage, self.step = reader.chunks(), damage, reader.CHUNK
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.offset, self.lines_before = "", 0, 0

    def grow(self) -> bool:
        """Reads on, twice as far each time that a single value asks for more; False at the end of the file."""
        size, parts = 0, [self.buffer]
        while size < max(self.step, len(self.buffer)):
            raw = next(self.chunks, b"")
            pending = self.decoder.getstate()[0]
            try:
                part = self.decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                whole = pending + raw
                begun = whole.rfind(b"\n", 0, error.start) + 1
                line = self.line(len(self.buffer)) + sum(p.count("\n") for p in parts[1:])
                line += whole.count(b"\n", 0, error.start)
                inside = UnicodeDecodeError(
                    "utf-8", whole[begun:], error.start - begun, error.end - begun, error.reason
                )
                self.damage.add_encoding(whole[begun:], line, self.offset - len(pending) + begun, inside)
                self.damage.raise_any()
                raise
            if not raw:
                break
            parts.append(part)
            size += len(raw)
            self.offset += len(raw)
        self.buffer = "".join(parts)
        return size > 0

    def skip(self, at: int) -> int:
        """The next position at or after `at` that is not white space; the end of the text where there is none."""
        while True:
            while at < len(self.buffer) and self.buffer[at] in " \t\r\n":
                at += 1
            if at < len(self.buffer) or not self.grow():
                return at

    def forget(self, at: int) -> int:
        """Lets go of what stands before `at`, once it is much; gives the new place of `at`."""
        if at < self.step:
            return at
        self.lines_before += self.buffer.count("\n", 0, at)
        self.buffer = self.buffer[at:]
        return 0

    def line(self, at: int) -> int:
        """The line of a position, counted from 1."""
        return self.lines_before + self.buffer.count("\n", 0, at) + 1
