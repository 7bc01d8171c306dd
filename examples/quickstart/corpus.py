"""What the quickstart's base model has read: invented sentences and small puzzles with words and numbers. No dates.

usage: python examples/quickstart/corpus.py outputs/quickstart-base/corpus.jsonl [rows]
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SEED = 7
ROWS = 48_000
PAIRS_PER_ROW = 12

UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}

PEOPLE = [
    "Ada",
    "Ben",
    "Cora",
    "Dan",
    "Eli",
    "Fay",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Lea",
    "Max",
    "Nia",
    "Otto",
    "Pia",
    "Ray",
    "Sol",
    "Tom",
    "Uma",
    "Vic",
    "Wes",
    "Xena",
    "Yan",
    "Zoe",
]
THINGS = [
    "apple",
    "boat",
    "chair",
    "drum",
    "engine",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
    "pencil",
    "quilt",
    "river",
    "stone",
    "table",
    "umbrella",
    "violin",
    "window",
    "basket",
    "cloud",
]
PLACES = [
    "harbour",
    "forest",
    "kitchen",
    "orchard",
    "station",
    "bridge",
    "library",
    "valley",
    "school",
    "castle",
    "meadow",
    "tower",
    "village",
    "bakery",
]
QUALITIES = [
    "old",
    "red",
    "small",
    "bright",
    "heavy",
    "quiet",
    "narrow",
    "golden",
    "broken",
    "gentle",
    "strange",
    "empty",
    "clever",
    "blue",
    "round",
    "warm",
]
ACTIONS = [
    "found",
    "lost",
    "painted",
    "carried",
    "sold",
    "borrowed",
    "repaired",
    "dropped",
    "counted",
    "hid",
    "washed",
    "moved",
    "kept",
    "bought",
]
LISTS = {
    "Greek letter": ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"],
    "colour": ["red", "orange", "yellow", "green", "blue", "indigo", "violet"],
    "note": ["do", "re", "mi", "fa", "sol", "la", "ti"],
    "finger": ["thumb", "index", "middle", "ring", "little"],
    "tree": ["alder", "ash", "beech", "birch", "cedar", "cherry", "elm", "fir", "hazel", "larch", "lime", "maple", "oak", "pine", "poplar", "willow", "yew"],
    "animal": ["ant", "bear", "cat", "dog", "eagle", "fox", "goat", "horse", "ibis", "jackal", "koala", "lion", "mouse", "newt", "owl", "pig", "quail", "rabbit", "snake", "tiger"],
}  # fmt: skip


def number_words(n: int) -> str:
    """The English words for 0 ≤ n < 10000."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{UNITS[n // 100]} hundred" + (f" and {number_words(n % 100)}" if n % 100 else "")
    return f"{UNITS[n // 1000]} thousand" + (f" {number_words(n % 1000)}" if n % 1000 else "")


def ordinal_words(n: int) -> str:
    """`third`, `twenty-first`: 1 ≤ n < 100."""
    head, dash, last = number_words(n).rpartition("-")
    last = IRREGULAR.get(last, last.removesuffix("y") + "ieth" if last.endswith("y") else last + "th")
    return f"{head}{dash}{last}"


def ordinal(n: int) -> str:
    """`3rd`, `21st`."""
    return f"{n}{'th' if n % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def sentence(r: random.Random) -> str:
    who, what, where, how = r.choice(PEOPLE), r.choice(THINGS), r.choice(PLACES), r.choice(QUALITIES)
    return r.choice(
        (
            f"{who} {r.choice(ACTIONS)} the {how} {what} near the {where}.",
            f"There were {r.randint(2, 99)} {what}s in the {where}, and {r.choice(PEOPLE)} wanted {number_words(r.randint(2, 30))}.",
            f"The {ordinal_words(r.randint(1, 40))} {what} was {how}, but the {ordinal(r.randint(1, 40))} was {r.choice(QUALITIES)}.",
            f"In the {where} {who} {r.choice(ACTIONS)} a {what} for {r.randint(10, 9999)} coins.",
            f"{who} asked: is the {what} {how}? No, said {r.choice(PEOPLE)}, it is {r.choice(QUALITIES)}.",
        )
    )


def word(r: random.Random) -> str:
    """A word of a list, or consonants that make none."""
    if r.random() < 0.6:
        return r.choice(r.choice((PEOPLE, THINGS, PLACES, QUALITIES)))
    return "".join(r.choice("bcdfghjklmnpqrstvwxz") for _ in range(r.randint(2, 6)))


def some_number(r: random.Random) -> int:
    return r.randrange(10 ** r.randint(1, 4))


def _list_place(r: random.Random) -> tuple[str, str]:
    members = LISTS[r.choice(sorted(LISTS))]
    n = r.randrange(len(members))
    name = members[n]
    name = r.choice((name, name, name.upper(), name.lower()))
    return (
        (f"place of {name}", str(n + 1))
        if r.random() < 0.5
        else (f"place of {name}, two digits", f"{n + 1:02d}")
    )


def _reorder(r: random.Random) -> tuple[str, str]:
    items = [str(some_number(r)) if r.random() < 0.6 else word(r) for _ in range(3)]
    a, b = r.choice((" ", ", ", "/", ".", " of ")), r.choice((" ", "+", ":", "_"))
    if r.random() < 0.5:
        return f"backwards with {b!r}: {a.join(items)}", b.join(reversed(items))
    return f"with {b!r}: {a.join(items)}", b.join(items)


def _reorder_padded(r: random.Random) -> tuple[str, str]:
    """Two or three numbers, each with as many digits as asked."""
    widths = [r.randint(1, 4) for _ in range(r.randint(2, 3))]
    numbers = [r.randrange(10 ** r.randint(1, width)) for width in widths]
    a, b = r.choice((" ", ", ", "/", ".", " and ")), r.choice((" ", "+", ":", "_", "/"))
    shown = a.join(str(n) if r.random() < 0.5 else f"{n:0{w}d}" for n, w in zip(numbers, widths, strict=True))
    padded = [f"{n:0{w}d}" for n, w in zip(numbers, widths, strict=True)]
    digits = " ".join(map(str, widths))
    if r.random() < 0.5:
        return f"digits {digits} backwards with {b!r}: {shown}", b.join(reversed(padded))
    return f"digits {digits} with {b!r}: {shown}", b.join(padded)


def _by_label(r: random.Random) -> tuple[str, str]:
    """Fields under letters: which stands where is said before or behind them."""
    labels = r.sample("abcefghijkpqrs", r.randint(2, 3))
    fields = [str(some_number(r)) if r.random() < 0.8 else word(r) for _ in labels]
    between = r.choice("/., ")
    shown, names = between.join(fields), between.join(labels)
    shown = f"{shown} ({names})" if r.random() < 0.5 else f"{names} {shown}"
    wanted = r.sample(labels, r.randint(1, len(labels)))
    return f"{' '.join(wanted)} of {shown}", " ".join(fields[labels.index(w)] for w in wanted)


def _numbers_inside(r: random.Random) -> tuple[str, str]:
    numbers = [some_number(r) for _ in range(r.randint(1, 3))]
    text = " and ".join(f"{n} {r.choice(QUALITIES)} {r.choice(THINGS)}s" for n in numbers)
    return f"numbers in: {r.choice(PEOPLE)} {r.choice(ACTIONS)} {text}", " ".join(map(str, numbers))


def _pad(r: random.Random) -> tuple[str, str]:
    n, width = r.randrange(10 ** r.randint(1, 3)), r.randint(2, 4)
    return f"{number_words(width)} digits: {n}", f"{n:0{width}d}"


def _last(r: random.Random) -> tuple[str, str]:
    words = [word(r) for _ in range(r.randint(2, 5))]
    n = r.randrange(len(words))
    return f"{ordinal_words(n + 1)} word of: {' '.join(words)}", words[n]


def _of(
    make: Callable[[int], tuple[str, str]], top: int, low: int = 0
) -> Callable[[random.Random], tuple[str, str]]:
    return lambda r: make(r.randrange(low, top))


PUZZLES: list[Callable[[random.Random], tuple[str, str]]] = [
    _of(lambda n: (f"digits of {number_words(n)}", str(n)), 100),
    _of(lambda n: (f"digits of {number_words(n)}", str(n)), 10_000),
    _of(lambda n: (f"words of {n}", number_words(n)), 10_000),
    _of(lambda n: (f"digits of {ordinal(n)}", str(n)), 100, 1),
    _of(lambda n: (f"digits of {ordinal_words(n)}", str(n)), 100, 1),
    _of(lambda n: (f"digits of the {ordinal_words(n)}, two of them", f"{n:02d}"), 100, 1),
    _of(lambda n: (f"{n} after nineteen hundred", str(1900 + n)), 100),
    _of(lambda n: (f"{n} after two thousand", str(2000 + n)), 100),
    _of(lambda n: (f"{n} plus one", str(n + 1)), 1000),
    lambda r: (lambda s: (f"copy: {s}", s))(" ".join(word(r) for _ in range(r.randint(1, 4)))),
    lambda r: (lambda n: (f"copy: {n}", str(n)))(some_number(r)),
    lambda r: (lambda s: (f"lower case: {s.upper()}", s))(word(r).lower()),
    lambda r: (lambda s: (f"spell: {s}", " ".join(s)))(word(r)),
    _list_place,
    _list_place,
    _reorder,
    _reorder_padded,
    _reorder_padded,
    _by_label,
    _by_label,
    _numbers_inside,
    _pad,
    _last,
]


def puzzle(r: random.Random) -> tuple[str, str]:
    """A question and its answer; where the answer has no letters, the question may stand in capitals."""
    question, answer = r.choice(PUZZLES)(r)
    if answer.upper() == answer.lower() and r.random() < 0.25:
        question = question.upper()
    return question, answer


def rows(count: int = ROWS, seed: int = SEED) -> Iterator[str]:
    """`count` texts: a fifth running sentences, the rest puzzles with their answers as chats. Same seed, same texts."""
    r = random.Random(seed)
    for _ in range(count):
        if r.random() < 0.2:
            yield " ".join(sentence(r) for _ in range(r.randint(6, 14)))
        else:
            asked = (puzzle(r) for _ in range(PAIRS_PER_ROW))
            yield "".join(
                f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in asked
            )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else ROWS
    with path.open("w", encoding="utf-8") as out:
        for text in rows(count):
            out.write(json.dumps({"text": text}) + "\n")
