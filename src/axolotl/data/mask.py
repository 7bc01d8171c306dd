"""The loss mask of a conversation: which characters, and so which tokens, are trained.

Trained is all that the template writes because of a trained turn's content, reasoning and tool calls, up to and
including the stop token that ends the turn; never a role header, never the words that open a thinking block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from axolotl.data.encode import Encoded
from axolotl.data.templates import Trace
from axolotl.data.types import IGNORE_INDEX

When = Literal["all", "turn", "last", "none"]
_WIDTH: tuple[When, ...] = ("all", "turn", "last", "none")


@dataclass(frozen=True)
class StopRule:
    """What ends a turn, and when that is trained.

    `eos` is the tokenizer's EOS text; `eot` the end-of-turn texts that the user named; `train_on_eos` and `train_on_eot`
    are as the user wrote them; `control` finds every control token of the vocabulary; `openings` are the texts with which
    the template opens an assistant's turn, longest first.
    """

    eos: str | None
    eot: tuple[str, ...]
    train_on_eos: When | None
    train_on_eot: When | None
    control: re.Pattern[str] | None
    openings: tuple[str, ...] = ()

    def opened(self, text: str, at: int) -> int | None:
        """Where the words end that open an assistant's turn at `at`; None where no such turn begins there."""
        opening = next((o for o in self.openings if text.startswith(o, at)), None)
        return None if opening is None else at + len(opening)

    def when(self, stop: str) -> When:
        """When this stop token is trained. What is both the EOS and an end of turn heeds both options: the wider counts.

        Named in `eot_tokens`, it is an end of turn first, so that `train_on_eot: none` leaves it out.
        """
        on_eos = self.train_on_eos or "turn"
        on_eot = self.train_on_eot or on_eos
        if stop != self.eos or (stop in self.eot and on_eot == "none"):
            return on_eot
        if self.eot and stop not in self.eot:
            return on_eos
        return min(on_eos, on_eot, key=_WIDTH.index)


@dataclass(slots=True)
class Turn:
    """Where one turn stands in a rendered text: what came from it, and the stop token after it (None: there is none).

    `reach`: where its text ends before the stop token. `late`: the end of text that the template wrote only after
    the results of the turn's calls, and where the stop token after that begins and ends.
    """

    spans: list[tuple[int, int]]
    masked: list[tuple[int, int]]
    stop: tuple[int, int] | None = None
    reach: int = 0
    late: tuple[int, int, int] | None = None


@dataclass(slots=True)
class _Stretch:
    """Characters of one turn that no other turn interrupts: trained part start..end, and how far it reaches in all.

    `home`: it stands where the template was at that turn. A system text that the template moved into another turn does
    not, and has no end of its own there.
    """

    turn: int
    start: int | None
    end: int
    reach: int
    home: bool = True


def _stretches(trace: Trace, turns: list[Turn], regions: dict[int, tuple[int, int]]) -> list[_Stretch]:
    found: list[_Stretch] = []
    for start, end, source in trace.runs:
        region = regions.get(source.turn)
        home = region[0] <= start <= region[1] if region else not regions
        if not home and source.kind == "tool_calls":
            continue  # the name of a call that the template repeats beside its result
        if not found or found[-1].turn != source.turn or found[-1].home != home:
            found.append(_Stretch(source.turn, None, start, end, home))
        stretch = found[-1]
        stretch.reach = max(stretch.reach, end)
        if source.trained is False:
            turns[source.turn].masked.append((start, end))
        else:
            stretch.start = start if stretch.start is None else stretch.start
            stretch.end = max(stretch.end, end)
    return found


def locate_turns(trace: Trace, count: int, tool_turns: Sequence[bool], rule: StopRule) -> list[Turn]:
    """Finds each of the `count` turns in a rendered conversation. `tool_turns[i]`: turn i makes tool calls."""
    text = trace.text
    turns = [Turn([], []) for _ in range(count)]
    regions: dict[int, tuple[int, int]] = {}
    calls: dict[int, list[tuple[int, int]]] = {}  # what was written because of tool calls
    for begin, end, turn, tools in trace.own:
        if turn >= 0:
            regions[turn] = (regions[turn][0] if turn in regions else begin, end)
            if tools and tool_turns[turn]:
                calls.setdefault(turn, []).append((begin, end))
    stretches = _stretches(trace, turns, regions)
    seen = {s.turn for s in stretches}
    for turn, (begin, _) in regions.items():
        # a turn without any text of its own still ends, right after what opens it
        if turn not in seen and (at := rule.opened(text, begin)) is not None:
            stretches.append(_Stretch(turn, at, at, at))
    stretches.sort(key=lambda s: s.reach)
    final = {s.turn: i for i, s in enumerate(stretches) if s.home}
    loop = min((begin for begin, _ in regions.values()), default=0)
    for index, stretch in enumerate(stretches):
        turn, start = stretch.turn, stretch.start
        region = regions.get(turn)
        is_last = index + 1 == len(stretches)
        if start is not None:
            end = stretch.end
            if stretch.home and region and turn in calls:
                opens = max(calls[turn][0][0], rule.opened(text, region[0]) or 0)
                start = min(start, opens)
                if final[turn] != index:
                    # content follows the calls: their closing words belong to them all the same
                    end = max([end, *(b for a, b in calls[turn] if a <= end)])
            turns[turn].spans.append((start, end))
        if final.get(turn) == index:
            tail_end = region[1] if region else len(text) if is_last else _begin(stretches[index + 1])
            turns[turn].reach = stretch.reach
            turns[turn].stop = _find_stop(text, stretch.reach, tail_end, len(text), is_last, rule)
        elif not stretch.home and tool_turns[turn] and start is not None:
            tail_end = len(text) if is_last else _begin(stretches[index + 1])
            tail_end = min([tail_end, *(b for a, b in regions.values() if a <= start < b)])
            stop = _find_stop(text, stretch.reach, tail_end, len(text), False, rule)
            turns[turn].late = stop and (stretch.reach, *stop)
        elif not stretch.home and turn not in final and stretch.reach <= loop:
            # a system turn that the template writes whole, before it goes through the messages
            tail_end = loop if is_last else min(loop, _begin(stretches[index + 1]))
            stop = _find_stop(text, stretch.reach, tail_end, len(text), False, rule)
            turns[turn].stop = stop
            # other words between the two, the tools on offer say, are not that turn's
            apart = stop is not None and text[stretch.reach : stop[0]].strip()
            turns[turn].reach = stop[0] if apart and stop else stretch.reach
    return turns


def _begin(stretch: _Stretch) -> int:
    return stretch.reach if stretch.start is None else stretch.start


def _find_stop(
    text: str, start: int, end: int, limit: int, is_last: bool, rule: StopRule
) -> tuple[int, int] | None:
    """The stop token in text[start:end]; for the last turn, text up to `limit` counts where there is none before."""
    tail = text[start:end]
    for named in rule.eot:
        if (at := tail.find(named)) >= 0:
            return start + at, start + at + len(named)
    found = list(rule.control.finditer(tail)) if rule.control else []
    if found:
        return start + found[-1].start(), start + found[-1].end()
    if rule.eos and (at := tail.find(rule.eos)) >= 0:
        return start + at, start + at + len(rule.eos)
    if tail.strip():
        # control text that the vocabulary does not know: it ends the turn all the same
        return start + len(tail) - len(tail.lstrip()), start + len(tail.rstrip())
    if is_last and end < limit:
        match = rule.control.search(text, end, limit) if rule.control else None
        if match:
            return match.span()
    return None


def trained_ranges(
    turns: Sequence[Turn], trained: Sequence[bool], rule: StopRule, text: str
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Character ranges that are trained, and ranges that are masked inside them (`train_detail`). Both sorted."""
    keep: list[tuple[int, int]] = []
    drop: list[tuple[int, int]] = []
    last = max((i for i, yes in enumerate(trained) if yes and turns[i].stop is not None), default=-1)
    for i, turn in enumerate(turns):
        stop = turn.stop
        wanted = False
        if stop is not None:
            when = rule.when(text[stop[0] : stop[1]])
            wanted = when == "all" or (trained[i] and (when == "turn" or (when == "last" and i == last)))
        if trained[i]:
            keep.extend(turn.spans)
            drop.extend(turn.masked)
            if wanted and stop is not None:
                # the words between content and stop token (a closing tag, say) are the turn's as well
                keep.append((turn.reach, stop[1]))
                keep.extend([(turn.late[0], turn.late[2])] if turn.late else [])
        elif wanted and stop is not None:
            keep.append(stop)
            keep.extend([turn.late[1:]] if turn.late else [])
    return sorted(k for k in keep if k[1] > k[0]), sorted(drop)


def labels_of(
    encoded: Encoded, keep: Sequence[tuple[int, int]], drop: Sequence[tuple[int, int]]
) -> list[int]:
    """Labels: the id of each token that touches a kept range and no dropped one, -100 elsewhere."""
    ids = encoded.ids
    labels = [IGNORE_INDEX] * len(ids)
    for first, stop in _touching(encoded, keep):
        labels[first:stop] = ids[first:stop]
    for first, stop in _touching(encoded, drop):
        labels[first:stop] = [IGNORE_INDEX] * (stop - first)
    return labels


def _touching(encoded: Encoded, ranges: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """For each range of characters the tokens (first, after the last) that hold one of them."""
    if not ranges or not encoded.ids:
        return ()
    edges = np.array(ranges, np.int64)
    first = np.searchsorted(encoded.ends, edges[:, 0], "right").tolist()
    stop = np.searchsorted(encoded.starts, edges[:, 1], "left").tolist()
    return ((a, b) for a, b in zip(first, stop, strict=True) if b > a)
