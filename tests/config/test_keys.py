"""Every key has one owner, one line of meaning, and is found again when it is misspelt."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path

import pytest

from axolotl.config.descriptions import meaning, old_keys, state
from axolotl.config.keys import SECTIONS, distance, nearest, nested, owners
from axolotl.config.old_keys import CHOICES, OLD_KEYS, RENAMED
from axolotl.config.yaml_file import parse

HERE = Path(__file__).parent
REFERENCE = (HERE / "reference_keys.txt").read_text(encoding="utf-8").split()
EXAMPLES = sorted((HERE.parents[1] / "examples").rglob("*.yml")) + sorted((HERE / "cases").glob("*.yml"))
# Old keys of a dataset entry, which have a function of their own in renames.
OLD_IN_ENTRIES = {"datasets[].message_field_role", "datasets[].message_field_content"}


def test_sections_share_no_key() -> None:
    keys = [key for section in SECTIONS.values() for key in section.model_fields]
    assert len(keys) == len(set(keys))
    assert not OLD_KEYS & set(keys), "a key of today is listed among the old ones"


def test_every_key_of_the_reference_has_a_home() -> None:
    homes = {*owners(), *OLD_KEYS, *(n.dotted for n in nested()), *OLD_IN_ENTRIES}
    assert len(REFERENCE) > 700
    assert [key for key in REFERENCE if key not in homes] == []


def test_every_key_has_one_line_of_meaning() -> None:
    silent = [key for key in owners() if not meaning(SECTIONS[owners()[key]], key)]
    silent += [home.dotted for home in nested() if not meaning(home.block, home.key)]
    assert not silent
    lines = [meaning(SECTIONS[owners()[key]], key) for key in owners()]
    assert not [line for line in lines if "\n" in line or not line.endswith((".", "..."))]


# Facts that the program finds out by itself, and `strict`, which is always so.
_SAID_ANYWAY = {f"is_{name}_derived_model" for name in ("falcon", "llama", "mistral", "qwen")} | {
    "local_rank",
    "strict",
}


def test_no_key_is_accepted_and_ignored() -> None:
    """An available key is read by some code; one that is not says so in its state: `later`, `validated` or `idle`."""
    package = HERE.parents[1] / "src" / "axolotl"
    about_keys = {"config_page.py", "config_schema.py", "document.py"}
    readers = [f for f in package.rglob("*.py") if f.parent.parts[-1] != "rules" and f.name not in about_keys]
    text = "\n".join(
        f.read_text("utf-8") for f in readers if f.parent.name != "config" or f.name == "resolve.py"
    )
    words = set(re.findall(r"[.\"'](\w+)", text))
    unread = [k for k in owners() if state(SECTIONS[owners()[k]], k) == "available" and k not in words]
    assert set(unread) <= _SAID_ANYWAY, "these keys are read nowhere: give them a state"


def test_renames_lead_to_keys_of_today() -> None:
    for new in [*RENAMED.values(), *(new for new, _ in CHOICES.values())]:
        assert new in owners()
    assert set(old_keys()) == OLD_KEYS


def test_distance_counts_edits() -> None:
    assert distance("lora_r", "lora_r", 2) == 0
    assert distance("lroa_r", "lora_r", 2) == 1  # a swap
    assert distance("lora", "lora_r", 2) == 2
    assert distance("abc", "xyz", 2) == 3  # more than the limit


def _typo(rng: random.Random, word: str) -> str:
    at, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase + "_")
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at:],
            word[:at] + letter + word[at + 1 :],
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
        ]
    )


def test_typos_of_the_examples_are_understood() -> None:
    rng = random.Random(20)
    known = [*owners(), *OLD_KEYS]
    right = tried = 0
    for file in EXAMPLES:
        written = list(parse(file.read_text(encoding="utf-8"), file.name).values)
        for key in rng.sample(written, min(len(written), 12)):
            word = _typo(rng, key)
            if not word or word in known:
                continue
            tried += 1
            right += key in nearest(word, known, [each for each in written if each != key])
    assert tried > 200
    assert right / tried >= 0.98, f"{right} of {tried}"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("seqence_len", "sequence_len"),
        ("lora_target_module", "lora_target_modules"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("Learning_Rate", "learning_rate"),
        ("micro-batch-size", "micro_batch_size"),
        ("micro_batchsize", "micro_batch_size"),
    ],
)
def test_the_nearest_key_comes_first(word: str, meant: str) -> None:
    assert nearest(word, owners())[0] == meant


def test_nothing_is_suggested_for_nonsense() -> None:
    assert nearest("zzqqxxyy", owners()) == []
