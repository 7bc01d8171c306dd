"""Every key has one owner, one line of meaning, and is found again when it is misspelt."""

from __future__ import annotations

import ast
import random
import re
import string
from pathlib import Path

import pytest

from axolotl.config import load_config
from axolotl.config.descriptions import meaning, old_keys, state
from axolotl.config.keys import SECTIONS, distance, nearest, nested, owners
from axolotl.config.old_keys import CHOICES, OLD_KEYS, RENAMED
from axolotl.config.yaml_file import parse
from axolotl.errors import ConfigError

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


# Two keys decide others while a config is loaded, so nothing later has to ask for them.
_READ_WHILE_LOADING = {"plugins", "fused_kernels", "fsdp_config.activation_checkpointing"}
# Blocks that are handed on whole, as they are written.
_HANDED_ON = ("peft.loftq_config.",)
# Names that say what does not depend on a key, or which keys leave the prepared rows as they are: nobody reads there.
_LISTS = {"FIXED", "_NOT_IN_KEY", "_ENTRY_NOT_IN_KEY"}


def _read_outside_config() -> set[str]:
    """Every attribute and every text in the code outside config/, lists of keys apart."""
    words: set[str] = set()
    package = HERE.parents[1] / "src" / "axolotl"
    for file in package.rglob("*.py"):
        if file.relative_to(package).parts[0] == "config":
            continue
        tree = ast.parse(file.read_text("utf-8"))
        listed: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(each, ast.Name) and each.id in _LISTS for each in targets):
                    listed |= {id(inner) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in listed:
                continue
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    return words


def test_no_key_is_accepted_and_ignored() -> None:
    """An available key is read outside config/; one that is not says so in its state: `later`, `validated` or `idle`."""
    words = _read_outside_config()
    keys = [(key, SECTIONS[owners()[key]], key) for key in owners()]
    told = {key for key, section, _ in keys if state(section, key) != "available"}
    # What stands inside a block that is told as a whole needs no state of its own.
    keys += [
        (home.dotted, home.block, home.key)
        for home in nested()
        if re.split(r"[\[.]", home.dotted)[0] not in told
    ]
    unread = [
        dotted
        for dotted, model, key in keys
        if state(model, key) == "available"
        and key not in words
        and dotted not in _READ_WHILE_LOADING
        and not dotted.startswith(_HANDED_ON)
    ]
    assert unread == [], "these keys are read nowhere: give them a state"


@pytest.mark.parametrize(
    ("text", "kind", "key"),
    [
        ("push_dataset_to_hub: me", "unavailable", "push_dataset_to_hub"),
        ("skip_prepare_dataset: true", "unavailable", "skip_prepare_dataset"),
        ("remove_unused_columns: true", "warning", "remove_unused_columns"),
        ("sample_packing_eff_est: 0.9", "warning", "sample_packing_eff_est"),
        ("is_llama_derived_model: true", "warning", "is_llama_derived_model"),
        (
            "datasets: [{path: a, type: alpaca, trust_remote_code: true}]",
            "warning",
            "datasets[0].trust_remote_code",
        ),
        ("datasets: [{path: a, type: alpaca, conversation: chatml}]", "warning", "datasets[0].conversation"),
        ("datasets: [{path: a, type: alpaca, input_format: x}]", "unavailable", "datasets[0].input_format"),
    ],
)
def test_a_key_that_does_nothing_is_told_at_its_place(tmp_path: Path, text: str, kind: str, key: str) -> None:
    base = "base_model: x\nlearning_rate: 1e-4\n"
    base += "" if text.startswith("datasets") else "datasets: [{path: a, type: alpaca}]\n"
    file = tmp_path / "c.yml"
    file.write_text(base + text + "\n", encoding="utf-8")
    try:
        found = list(load_config(file).warnings)
    except ConfigError as error:
        found = error.problems
    [problem] = found
    assert (problem.kind, problem.keys[0], problem.places[0].line) == (kind, key, base.count("\n") + 1)


@pytest.mark.parametrize(
    "text",
    [
        "skip_prepare_dataset: false\nremove_unused_columns: false\nsample_packing_group_size: 100000",
        "push_dataset_to_hub:\ntotal_num_tokens: 0\nis_llama_derived_model: false\nmultipack_real_batches: false",
    ],
)
def test_off_is_not_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yml"
    base = (
        "base_model: x\nlearning_rate: 1e-4\ndatasets: [{path: a, type: alpaca, trust_remote_code: false}]\n"
    )
    file.write_text(base + text + "\n", encoding="utf-8")
    assert load_config(file).warnings == ()


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
