"""The quickstart's task: dates as people write them, and the same dates as YYYY-MM-DD. Writes train.jsonl and heldout.jsonl.

usage: python examples/quickstart/dates.py [folder]

Every way of writing has one reading only: months are named, or the order of the digits is said. A year of two digits
lies between 1950 and 2049. No date of heldout.jsonl is in train.jsonl, and none of its questions stands in one of its rows.
"""

from __future__ import annotations

import datetime
import json
import random
import sys
from pathlib import Path

SEED = 20
TRAIN_ROWS = 8_000
HELDOUT_ROWS = 400
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
SHORT = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sept", "Oct", "Nov", "Dec"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
    "twenty-first",
    "twenty-second",
    "twenty-third",
    "twenty-fourth",
    "twenty-fifth",
    "twenty-sixth",
    "twenty-seventh",
    "twenty-eighth",
    "twenty-ninth",
    "thirtieth",
    "thirty-first",
]


def ordinal(n: int) -> str:
    """`3rd`, `21st`."""
    return f"{n}{'th' if n in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def write(date: datetime.date, r: random.Random) -> str:
    """One of the ways in which a person writes `date`."""
    month = r.choice((MONTHS, MONTHS, SHORT))[date.month - 1]
    year = r.choice((f"{date.year}", f"{date.year}", f"'{date.year % 100:02d}"))
    day = r.choice((f"{date.day}", f"{date.day}", f"{date.day:02d}", ordinal(date.day)))
    weekday = WEEKDAYS[date.weekday()]
    short_year = r.choice((f"{date.year}", f"{date.year % 100:02d}"))
    text = r.choice(
        (
            f"{day} {month} {year}",
            f"{day} {month}, {year}",
            f"{month} {day} {year}",
            f"{month} {day}, {year}",
            f"{weekday}, {day} {month} {year}",
            f"{weekday[:3]} {month} {day} {year}",
            f"the {ordinal(date.day)} of {month} {year}",
            f"{weekday} the {ordinal(date.day)} of {month}, {year}",
            f"the {ORDINALS[date.day - 1]} of {month} {year}",
            f"the {ORDINALS[date.day - 1]} of {month}, {year}",
            f"{month} the {ORDINALS[date.day - 1]}, {year}",
            f"{weekday}, {month} the {ORDINALS[date.day - 1]} {year}",
            f"{date.day}-{SHORT[date.month - 1]}-{date.year}",
            f"{date.year} {month} {date.day}",
            # These two are the hardest to tell apart, so they come more often.
            *(f"{date.day}/{date.month}/{short_year} (d/m/y)", f"d/m/y {date.day}/{date.month}/{short_year}")
            * 2,
            *(f"{date.month}/{date.day}/{short_year} (m/d/y)", f"m/d/y {date.month}/{date.day}/{short_year}")
            * 2,
            f"{date.day:02d}.{date.month:02d}.{date.year} (d.m.y)",
            f"{date.year}/{date.month}/{date.day}",
        )
    )
    return r.choice((text, text, text, text.lower(), text.upper()))


def rows(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held-out) rows, each {"question", "answer"}; disjoint by date, and no held-out question inside a train row."""
    r = random.Random(seed)
    dates = [FIRST + datetime.timedelta(days=n) for n in range((LAST - FIRST).days + 1)]
    r.shuffle(dates)
    unseen, seen = dates[: 2 * HELDOUT_ROWS], dates[2 * HELDOUT_ROWS :]
    train = [
        {"question": write(d, r), "answer": d.isoformat()}
        for d in (r.choice(seen) for _ in range(TRAIN_ROWS))
    ]
    everything = "\n".join(f"{row['question']}\n{row['answer']}" for row in train)
    heldout: dict[str, str] = {}
    for d in unseen:
        question = write(d, r)
        if question not in everything and len(heldout) < HELDOUT_ROWS:
            heldout[question] = d.isoformat()
    return train, [{"question": q, "answer": a} for q, a in heldout.items()]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, part in zip(("train", "heldout"), rows(), strict=True):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for row in part:
                messages = [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ]
                out.write(json.dumps({"messages": messages}) + "\n")
