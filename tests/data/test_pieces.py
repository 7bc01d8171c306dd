"""Long texts are cut only where the tokens of the parts are those of the whole."""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from axolotl.data.encode import Encoder
from axolotl.data.pieces import Cutter

FIXTURES = Path(__file__).parents[1] / "fixtures"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence([*steps, BYTES])


WORDS = {
    "as it is": None,
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "o200k": split(O200K),
    "in three steps": split(r"\p{N}{1,3}", r"[\u4e00-\u9fff\u3040-\u30ff]+", r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+"),
}


@functools.cache
def backend(words: str) -> Tokenizer:
    """A fixture's tokenizer that finds words in another way."""
    made = Tokenizer.from_file(str(FIXTURES / "tiny-llama3" / "tokenizer.json"))
    if WORDS[words] is not None:
        made.pre_tokenizer = WORDS[words]
        made.normalizer = normalizers.NFC()
    return made


TEXT = st.lists(
    st.one_of(
        st.text(alphabet="aé字я e\u03011²'.,\n\t\r。，!", max_size=12),
        st.sampled_from(
            ["we'll ", "<|eot_id|>", "<|eot_id|> a", "  \n\n ", "3.14", "字。字", "word. ", "👩‍👩‍👧"]
        ),
        st.text(max_size=6),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("words", WORDS)
@settings(max_examples=80, deadline=None)
@given(text=TEXT, piece=st.integers(1, 9))
def test_pieces_have_the_tokens_of_the_whole(words: str, text: str, piece: int) -> None:
    tokenizer = backend(words)
    pieces = Cutter(tokenizer, piece).cut(text)
    assert "".join(pieces) == text
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    parts = [tokenizer.encode(p, add_special_tokens=False).ids for p in pieces]
    assert list(itertools.chain.from_iterable(parts)) == whole


def test_ordinary_prose_is_cut() -> None:
    for words in WORDS:
        pieces = Cutter(backend(words), 100).cut("The river is wide, and no one rows.\n" * 50)
        assert max(map(len, pieces)) <= 200


def test_a_tokenizer_that_does_not_split_at_spaces_is_left_alone() -> None:
    whole = Tokenizer(models.BPE())
    whole.decoder = decoders.ByteLevel()
    for steps in (None, pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        if steps is not None:
            whole.pre_tokenizer = steps
        assert len(Cutter(whole, 2).cut("one two three four five")) == 1
    spaced = Tokenizer.from_file(str(FIXTURES / "tiny-llama3" / "tokenizer.json"))
    spaced.add_tokens(["ends here. Then"])
    parts = Cutter(spaced, 3).cut("words\nends here. Then\nends here. Then")
    assert all("ends" not in part or "ends here. Then" in part for part in parts)


@pytest.mark.parametrize("quoted", [False, True])
def test_long_texts_keep_ids_and_places(quoted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(FIXTURES / "tiny-llama3"))
    monkeypatch.setattr("axolotl.data.encode.LONG", 100)
    monkeypatch.setattr(encoder, "_cutter", Cutter(encoder.backend, 50), raising=False)
    draw = random.Random(1)
    words = ["river ", "é字。", "'ll ", "<|eot_id|>", "\n", "12 ", "👩‍👩‍👧 "]
    text = "".join(draw.choices(words, k=300))
    assert len(encoder._cutter.cut(text)) > 3
    slow = encoder.backend.encode(text, add_special_tokens=False)
    found = encoder.encode_guarded(text, []) if quoted else encoder.encode([text, "short"])[0]
    assert found.ids == slow.ids == encoder.ids(["short", text])[1]
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == slow.offsets
